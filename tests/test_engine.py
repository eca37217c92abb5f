"Engine: what does not read well as a notebook cell."
import random
import pytest, torch
from torch._dynamo.exc import BackendCompilerFailed
from nanochat_nb.engine import Engine, Frozen, Request, decode_step
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.settings import NanochatError
from nanochat_nb.tokenizer import train_tokenizer

TEXTS = [f"{i}+{j} 等于几 how much is it 你好世界 hello" for i in range(10) for j in range(10)]

@pytest.fixture(scope="module")
def tok(): return train_tokenizer(TEXTS, 300)

def make_engine(tok, *, seed=0, seq_len=64, n_kv_head=2, runtime=None, n_layer=2, **form):
    model = GPT(GPTConfig(n_layer, 2, n_kv_head, 64, tok.vocab_size, seq_len, **form))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .4, generator=g)
    return Engine(model, tok, runtime)

@pytest.fixture(scope="module")
def engine(tok): return make_engine(tok)

class Scripted:
    "A model that says what it is told: row by row of prompts that begin with bos and a row's number."
    def __init__(self, model, script): self.model, self.script, self.cfg, self.device = model, script, model.cfg, model.device
    def parameters(self): return []
    def features(self, x, cache):
        self.at = cache.begin(x.size(1))[0]
        self.rows = getattr(self, "rows", {}) | ({r: int(x[i, 1]) for i, r in enumerate(cache.rows.tolist())} if hasattr(cache, "rows") else {})
        return x
    def logits(self, x):
        out = torch.zeros(len(x), self.cfg.vocab_size)
        for r in range(len(x)):
            script = self.script[self.rows[r]]
            out[r, script[min(int(self.at[r, 0]) - 2, len(script) - 1)]] = 9
        return out

@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_tool_rows_and_plain_rows_share_a_batch(tok, engine, chunk):
    "A scripted model calls the tool in one row only; the other row is not disturbed, whatever was decoded in vain."
    S, E = tok.special("python_start"), tok.special("python_end")
    script = {0: [S, *tok.encode("6*7"), E] + tok.encode("!") * 30, 1: tok.encode("hello") + tok.encode("?") * 30}
    e = Engine(Scripted(engine.model, script), tok)
    e.chunk = chunk
    prompts = [[tok.bos_id, r, 9] for r in (0, 1)]
    out = e.generate(prompts, 12, temperature=0)
    assert "6*7<|python_end|><|output_start|>42<|output_end|>!" in tok.decode(out[0]) and len(out[0]) == 12
    assert out[1] == script[1][:12]
    assert "output" not in tok.decode(e.generate(prompts, 12, temperature=0, tools=False)[0])


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("kw", [dict(temperature=0), dict(temperature=1.0), dict(temperature=2.0, top_k=10), dict(top_p=.7)])
def test_rows_do_not_depend_on_their_batch(tok, kv, kw):
    e, rng = make_engine(tok, n_kv_head=kv), random.Random(0)
    prompts = [[tok.bos_id] + [rng.randrange(256) for _ in range(rng.randint(0, 62))] for _ in range(17)]
    alone = [e.generate([p], 50, seed=9 + r, **kw)[0] for r, p in enumerate(prompts)]
    assert e.generate(prompts, 50, seed=9, **kw) == alone
    for size in (3, 5): assert e.generate(prompts, 50, seed=9, batch_size=size, **kw) == alone     # refilled
    e.chunk = 8
    assert e.generate(prompts, 50, seed=9, batch_size=4, **kw) == alone                              # looked at rarely
    assert e.generate(prompts[::-1], 50, seed=range(9 + 16, 8, -1), batch_size=4, **kw) == alone[::-1]
    assert e.generate(prompts, 7, seed=9, **kw) == [a[:7] for a in alone]

def test_a_document_is_continued_from_its_bos_and_without_tools(tok, engine):
    assert engine.complete("hello", max_tokens=9, temperature=0) == engine.text(
        engine.generate([[tok.bos_id, *tok.encode("hello")]], 9, temperature=0, tools=False)[0])
    text = "zq"                                                                          # two tokens: no merge joins them
    call = [tok.special("python_start"), *tok.encode("6*7"), tok.special("python_end")]
    e = Engine(Scripted(engine.model, {tok.encode(text)[0]: call + tok.encode("!") * 30}), tok)
    said = [e.complete(text, max_tokens=14, temperature=0, **kw).count("!") for kw in ({}, dict(tools=True))]
    assert said[0] > said[1] > 0

def test_window(tok, engine):
    edge = [[tok.bos_id] * n for n in (1, 40, 63, 64)]
    assert [len(a) for a in engine.generate(edge, 1000, stop=())] == [63, 24, 1, 0]
    assert engine.generate([], 5) == [] and engine.generate(edge, 0) == [[]] * 4

def test_own_stop_tokens(tok, engine):
    a = engine.generate([[tok.bos_id]], 30, temperature=0, stop=())[0]
    assert engine.generate([[tok.bos_id]], 30, temperature=0, stop={a[5]})[0] == a[:a.index(a[5])]

def test_score_is_the_same_in_any_batch(tok, engine):
    rng = random.Random(3)
    pairs = [([tok.bos_id] + [rng.randrange(256) for _ in range(rng.randint(0, 40))],
              [rng.randrange(256) for _ in range(rng.randint(0, 20))]) for _ in range(23)]
    want = []
    for p, c in pairs:
        with torch.no_grad(): logp = engine.model(torch.tensor([p + c]))[0].log_softmax(-1)
        want.append(sum(logp[len(p) - 1 + i, t].item() for i, t in enumerate(c)))
    for size in (1, 4, 64):
        got = engine.score(pairs, batch_size=size)
        assert [v for v, _ in got] == pytest.approx(want, abs=2e-3) and [n for _, n in got] == [len(c) for _, c in pairs]
    assert engine.score([]) == [] and len(engine.score([([1] * 64, [2])])) == 1 and engine.score([([1], [])]) == [(0, 0)]

def test_streams_whole_characters(tok, engine):
    S, E, O, X = map(tok.special, ("python_start", "python_end", "output_start", "output_end"))
    assert engine.text([S, *tok.encode("1+2"), E, O, *tok.encode("3"), X, *tok.encode("等于3")]) == "等于3"
    assert engine.text(tok.encode("龘👋🏽é")) == "龘👋🏽é"
    assert engine.text(list("龘".encode())[:0] + tok.encode("龘")[:-1] + tok.encode("1")) == "1"
    for seed in range(30):
        pieces = list(engine.stream([{"role": "user", "content": "你好"}], 50, temperature=1.5, seed=seed))
        assert all(pieces) and "\ufffd" not in "".join(pieces)
        "".join(pieces).encode("utf-8")
    assert engine.chat([{"role": "user", "content": "hi"}], max_tokens=9, temperature=0) == "".join(
        engine.stream([{"role": "user", "content": "hi"}], 9, temperature=0))
    assert isinstance(engine.complete("hello", max_tokens=9), str)

class Half:
    device = torch.device("cpu")
    def autocast(self): return torch.autocast("cpu", torch.bfloat16)

def test_bfloat16(tok):
    full, half = make_engine(tok), make_engine(tok, runtime=Half())
    assert half.dtype == torch.bfloat16 and full.dtype == torch.float32
    pairs = [(tok.encode("hello"), tok.encode("你好世界"))] * 3
    for (a, _), (b, _) in zip(full.score(pairs), half.score(pairs)): assert a == pytest.approx(b, rel=.05)
    assert len(half.generate([[tok.bos_id], [1, 2, 3]], 10, temperature=0)) == 2
    assert half.fast.head.weight.dtype == torch.bfloat16 and half.fast.wte.weight is half.model.wte.weight
    assert not torch.is_autocast_enabled("cpu")

def test_int8_is_close_and_follows_the_model(tok):
    full, small = make_engine(tok), make_engine(tok)
    small.int8 = True
    small._refresh()
    x = torch.tensor([[tok.bos_id, 5, 6, 7]])
    with torch.no_grad(): a, b = full.model(x).softmax(-1), small.fast(x).softmax(-1)
    assert (a - b).abs().sum(-1).max() < .15
    w = small.model.head.weight
    with torch.no_grad(): w.mul_(2)
    small._refresh()
    got = small.fast.head.weight * small.fast.head.scale[:, None]
    assert ((got - w).abs().amax(1) <= w.abs().amax(1) / 127).all()
    assert sum(isinstance(m, Frozen) for m in small.fast.modules()) == 4 * 2 + 1    # q, k and v are one

@pytest.mark.parametrize("how", [{}, dict(int8=True), dict(compile=True)])
def test_other_weights_are_noticed_however_they_came(tok, how):
    import shutil
    if how == dict(compile=True) and not (shutil.which("g++") or shutil.which("clang++")): pytest.skip("no C++ compiler")
    prompts = [[tok.bos_id] * n for n in (1, 3, 20, 9, 2, 2)]
    def make(seed): return vars(e := make_engine(tok, seed=seed)).update(how) or e
    def says(e): return e.generate(prompts, 20, temperature=0, tools=False)
    new, want = make(1).model, says(make(1))
    def swap(e): e.model = new
    def data(e):
        for p, q in zip(e.model.parameters(), new.parameters()): p.data = q.data
    for change in (swap, data, lambda e: e.model.load_state_dict(new.state_dict()),
                   lambda e: e.model.load_state_dict(new.state_dict(), assign=True)):
        e = make(0)
        assert says(e) != want
        change(e)
        assert says(e) == want, change

def test_int8_may_be_set_later(tok):
    e = make_engine(tok, runtime=Half())
    e.generate([[1]], 2); e.int8 = True; e.generate([[1]], 2)
    assert e.fast.head.weight.dtype == torch.int8
    e.int8 = False; e.generate([[1]], 2)
    assert e.fast.head.weight.dtype == torch.bfloat16

def test_frozen_copy_leaves_the_model_alone(tok):
    e = make_engine(tok, runtime=Half())
    before = {k: v.clone() for k, v in e.model.state_dict().items()}
    e.generate([[tok.bos_id]], 5)
    assert all(torch.equal(v, before[k]) for k, v in e.model.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in e.model.parameters())

def test_runs_of_one_engine_do_not_disturb_each_other(tok, engine):
    a, b = (engine.requests([[tok.bos_id, 5]], 30, seed=s, stop=()) for s in (1, 2))
    first, second = engine.drain(a), engine.drain(b)
    for _ in range(3): next(first), next(second)
    first.close()
    for _ in second: pass
    assert len(a[0].out) == 3 and b[0].out == engine.generate([[tok.bos_id, 5]], 30, seed=2, stop=())[0]

def test_cancelled_requests_leave_their_rows(tok, engine):
    todo = engine.requests([[tok.bos_id]] * 6, 40, stop=())
    wait, seen = list(todo), 0
    for events in engine.run(lambda n, idle: [wait.pop(0) for _ in range(min(n, len(wait)))], 2, 64):
        seen += 1
        if seen == 3: todo[0].ended = "cancelled"
    assert [len(q.out) for q in todo] == [3] + [40] * 5 and todo[1].ended == "length"

@pytest.mark.parametrize("ahead", [False, True])
def test_a_free_row_leaves_nothing_to_its_next_guest(tok, monkeypatch, ahead):
    "It marks time beyond what the others read; its stretch must not be empty, or it writes NaN, and 0 x NaN is NaN."
    monkeypatch.setattr("nanochat_nb.engine.compiled_step", lambda *_: decode_step)
    def make(): return make_engine(tok, seq_len=256, arch="modern", n_layer=3, chunk=16)
    long, short, late = todo = [Request([tok.bos_id] + [7] * n, m, 0, stop=set()) for n, m in ((150, 4), (5, 150), (4, 200))]
    wait, e = [[late], [long, short]], make()
    e.compile, e.ahead, e.chunk = True, ahead, 4
    for _ in e.run(lambda n, idle: wait.pop() if len(short.out) >= 10 * (2 - len(wait)) and wait else [], 2, 256): pass
    assert [q.out for q in todo] == [make().generate([q.prompt], q.max_tokens, 0, stop=())[0] for q in todo]

def test_a_batch_that_shrank_grows_again(tok, engine):
    first, *more = engine.requests([[tok.bos_id]] * 4, 40, stop=())
    wait, together = [more, [first]], 0
    for events in engine.run(lambda n, idle: wait.pop() if len(first.out) >= 10 * (2 - len(wait)) and wait else [], 4, 64):
        together = max(together, len(events))
    assert together == 4 and [q.out for q in more] == [engine.generate([q.prompt], 40, seed=q.seed, stop=())[0] for q in more]

@pytest.mark.parametrize("how", [{}, dict(top_k=[9, 3, None, 40], top_p=[None, .9, .8, None])])
def test_the_compiled_step_says_the_same(tok, how):
    import shutil
    if not (shutil.which("g++") or shutil.which("clang++")): pytest.skip("no C++ compiler")
    e = make_engine(tok, n_kv_head=1)
    prompts = [[tok.bos_id] * n for n in (1, 3, 20, 9)]
    want = e.generate(prompts, 30, seed=3, tools=False, **how)
    e.compile = True
    assert e.generate(prompts, 30, seed=3, tools=False, **how) == want
    assert e.generate(prompts, 30, seed=3, tools=False, batch_size=3, **how) == want    # padded to four rows, refilled

def test_weights_in_compiled_code_do_not_outlive_a_change(tok):
    "From five rows on a CPU the weights are packed into the code; other weights, or another model, must not meet it."
    import shutil
    if not (shutil.which("g++") or shutil.which("clang++")): pytest.skip("no C++ compiler")
    e, other, prompts = make_engine(tok), make_engine(tok, seed=1), [[tok.bos_id] * n for n in (1, 3, 20, 9, 2, 2)]
    def says(e, compile):
        e.compile = compile
        return e.generate(prompts, 20, temperature=0, tools=False)
    before, want = says(e, False), says(other, False)
    assert says(e, True) == before and says(other, True) == want != before
    assert all(b.packed for b in e.idle.values())
    todo = e.requests(prompts, 20, 0, tools=False)
    left = e.drain(todo); next(left)                                   # a run that is left lying while the weights change
    with torch.no_grad():
        for mine, new in zip(e.model.parameters(), other.model.parameters()): mine.copy_(new)
    assert says(e, True) == want
    left.close()
    assert says(e, True) == want and e.idle and not any(b.packed for b in e.idle.values())
    entries = len(torch._dynamo.eval_frame._debug_get_cache_entry_list(decode_step.__code__))
    for i in range(3):                                                 # weights that change are not packed again
        with torch.no_grad():
            for p in e.model.parameters(): p.mul_(.9)
        got = says(e, True)
        assert got == make_like(e, tok).generate(prompts, 20, temperature=0, tools=False)
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(decode_step.__code__)) == entries

def make_like(e, tok):
    "An engine of its own with the same weights, not compiled."
    new = make_engine(tok)
    new.model.load_state_dict(e.model.state_dict())
    return new

def test_what_was_kept_in_inference_mode_serves_outside(tok):
    e, prompts = make_engine(tok), [[tok.bos_id, 5], [tok.bos_id, 6, 7]]
    want, e.ahead = e.generate(prompts, 12, temperature=0), True       # batches are kept, as on a GPU
    with torch.inference_mode(): assert e.generate(prompts, 12, temperature=0) == want
    assert e.idle and e.generate(prompts, 12, temperature=0) == want

@pytest.mark.parametrize("kw,said", [
    (dict(prompts=[[]]), "prompt 0 is empty"), (dict(prompts=[[1], [1] * 65]), "prompt 1 has 65 tokens"),
    (dict(prompts=[[1, 9999]]), "prompt 0 holds a token id"), (dict(prompts=[[1]], temperature=-1), "temperature=-1"),
    (dict(prompts=[[1]], top_k=0), "top_k=0"), (dict(prompts=[[1]], top_p=1.5), "top_p=1.5"),
    (dict(prompts=[[1]], temperature=[1, 2]), "2 temperatures for 1 prompts"), (dict(prompts=[[1]], max_tokens=-5), "max_tokens=-5"),
    (dict(prompts=[[1]], seed=[1, 2]), "2 seeds for 1 prompts"), (dict(prompts=[[1]], seed=1.5), "seed=1.5: expected a whole number"),
    (dict(prompts=["hello"]), "prompt 0: expected token ids"), (dict(prompts=[1, 2]), "prompt 0: expected token ids"),
    (dict(prompts=[[1.5]]), "prompt 0: expected token ids"), (dict(prompts=[[1]], stop="end"), "stop: expected token ids"),
    (dict(prompts=[[1]], stop={-3}), "stop holds a token id"), (dict(prompts=[[1]], max_tokens=2.5), "max_tokens=2.5: expected a whole number"),
    (dict(prompts=[[1]], max_tokens=None), "max_tokens=None"), (dict(prompts=[[1]], temperature=["hot"]), "temperature='hot'"),
    (dict(prompts=[[1]], temperature=None), "temperature=None"), (dict(prompts=[[1]], top_k=2.5), "top_k=2.5"), (dict(prompts=[[1]], top_p=["x"]), "top_p='x'")])
def test_bad_input(engine, kw, said):
    with pytest.raises(NanochatError, match=said.replace("[", r"\[")): engine.generate(**kw)

def test_bad_pairs_and_vocabulary(tok, engine):
    with pytest.raises(NanochatError, match="pair 0 has an empty prompt"): engine.score([([], [1])])
    with pytest.raises(NanochatError, match="pair 1 has 66 tokens"): engine.score([([1], [1]), ([1] * 60, [1] * 6)])
    for bad in ([([1], [-3])], [([1], [9999])], [([9999], [])]):
        with pytest.raises(NanochatError, match="pair 0 holds a token id"): engine.score(bad)
    for f in (lambda: engine.score([([1], [1])], 0), lambda: engine.generate([[1]], 8, batch_size=0)):
        with pytest.raises(NanochatError, match="batch_size=0: expected at least 1"): f()
    with pytest.raises(NanochatError, match="vocab_size=500"): Engine(GPT(GPTConfig(1, 1, 1, 8, 500, 8)), tok)

def test_ids_and_numbers_may_be_numpys_or_torchs(engine):
    import numpy as np
    want = engine.generate([[1, 2], [1, 3]], 5, 1.5, 7, .5, seed=3)
    assert engine.generate(np.array([[1, 2], [1, 3]]), np.int64(5), np.float32(1.5), np.int32(7), np.float64(.5), seed=np.int64(3)) == want
    assert engine.generate(torch.tensor([[1, 2], [1, 3]]), 5, np.full(2, 1.5), 7, .5, seed=np.array([3, 4])) == want
    assert engine.score([(np.array([1, 2]), torch.tensor([3]))]) == engine.score([([1, 2], [3])])
    with pytest.raises(NanochatError, match="pair 0: expected token ids"): engine.score([("hello", [1])])

def test_leaves_the_model_trainable(tok):
    e = make_engine(tok)
    e.generate([[tok.bos_id], [1, 2, 3]], 5)
    x = torch.tensor([[1, 2, 3]])
    e.model(x, x).backward()
    assert all(p.grad is not None for p in e.model.parameters())

def test_goes_on_where_the_compiler_fails(tok, monkeypatch):
    def fails(*_): raise BackendCompilerFailed(lambda: 0, TypeError("no shape"), None)
    prompts = [[tok.bos_id, 5], [tok.bos_id, 6, 7]]
    want = make_engine(tok).generate(prompts, 12, temperature=0)
    monkeypatch.setattr("nanochat_nb.engine.compiled_step", lambda *_: fails)
    e = make_engine(tok)
    e.compile = True
    with pytest.warns(UserWarning, match="uncompiled"): assert e.generate(prompts, 12, temperature=0) == want
    assert not e.compile

def test_decoding_ahead_changes_nothing(tok):
    e, ahead = make_engine(tok), make_engine(tok)
    ahead.chunk, ahead.ahead = 4, True
    prompts = [[tok.bos_id, *range(5, 5 + n)] for n in (1, 4, 2, 9, 3, 3, 7)]
    for kw in (dict(temperature=0), dict(temperature=1., top_k=9, seed=3)):
        assert ahead.generate(prompts, 21, batch_size=3, **kw) == e.generate(prompts, 21, **kw)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_equals_cpu_with_tool_calls(tok, compile):
    "The tables of forced tokens take the memory that anything freed under a recorded graph leaves."
    e = make_engine(tok)
    call = [tok.special("python_start"), *tok.encode("12*3"), tok.special("python_end")]
    prompts = [[tok.bos_id, *call[:-1]], [tok.bos_id, 5, 6], [tok.bos_id, *range(5, 40)]] * 3
    with torch.no_grad(): e.model.head.weight[call[-1]] = e.model.head.weight.abs().amax() * 3    # calls, again and again
    want = e.generate(prompts, 60, temperature=0, stop=())
    gpu = Engine(e.model.cuda(), tok, compile=compile)
    for _ in range(3): assert gpu.generate(prompts, 60, temperature=0, stop=()) == want
