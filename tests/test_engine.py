"Engine: what does not read well as a notebook cell."
import random, time, warnings
import pytest, torch
from nanochat_nb.engine import Engine, ToolCall, calculate
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.settings import NanochatError
from nanochat_nb.tokenizer import SPECIAL, train_tokenizer
from nanochat_nb.world import World, conversations

TEXTS = [f"{i}+{j} 等于几 how much is it 你好世界 hello" for i in range(10) for j in range(10)]

@pytest.fixture(scope="module")
def tok(): return train_tokenizer(TEXTS, 300)

def make_engine(tok, *, seed=0, seq_len=64, n_kv_head=2, runtime=None):
    model = GPT(GPTConfig(2, 2, n_kv_head, 64, tok.vocab_size, seq_len))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .4, generator=g)
    return Engine(model, tok, runtime)

@pytest.fixture(scope="module")
def engine(tok): return make_engine(tok)


def test_random_expressions_never_raise():
    rng = random.Random(0)
    alphabet = list("0123456789.+-*/%()[]\"' ,") + ["count", "len", ".count(", '"aba"', "len(", "__", "x", "，", "\0", "\ud800"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20_000):
            r = calculate("".join(rng.choices(alphabet, k=rng.randint(1, 12))))
            assert r is None or (isinstance(r, str) and len(r) <= 40)

def test_calculator_agrees_with_python():
    rng = random.Random(1)
    for _ in range(2000):
        a, b, c = (rng.randint(-999, 999) for _ in "abc")
        assert calculate(f"({a})+({b})*({c})") == str(a + b * c)
        assert calculate(f"({a})-({b})-({c})") == str(a - b - c)
        if c: assert (calculate(f"({a})//({c})"), calculate(f"({a})%({c})")) == (str(a // c), str(a % c))
        if c: assert float(calculate(f"({a})/({c})")) == pytest.approx(a / c, abs=1e-9)

def test_calculator_is_quick_on_the_worst_input():
    t = time.perf_counter()
    for e in ("(" * 99 + "1" + ")" * 99, "-" * 199 + "1", "9*" * 99 + "9", '"' * 199, "len(" * 49 + '""' + ")" * 49,
              "9" * 10**6, '"' * 10**6, "len" * 10**5, "(" * 10**6):
        calculate(e)
    assert time.perf_counter() - t < 1

def test_calculator_agrees_with_the_world():
    parts = [m["content"] for c in conversations(World(), 3000) for m in c["messages"] if isinstance(m["content"], list)]
    calls = [(a["text"], b["text"]) for ps in parts for a, b in zip(ps, ps[1:]) if a["type"] == "python"]
    assert len(calls) > 300 and [calculate(e) for e, _ in calls] == [r for _, r in calls]


def play(tok, *tokens):
    state = ToolCall(tok)
    return [state.push(t) for t in tokens]

def test_tool_state(tok):
    S, E, O, X = map(tok.special, ("python_start", "python_end", "output_start", "output_end"))
    a = tok.encode("1+2")
    assert play(tok, S, *a, E, 0, 0, 0, 5) == [S, *a, E, O, *tok.encode("3"), X, 5]
    assert play(tok, E, 5, 6) == [E, 5, 6]                     # an end without a start is no call
    assert play(tok, S, S, *a, E, 0, 0)[-1] == tok.encode("3")[0]  # a second start begins anew
    assert play(tok, *([S, *a, E, 0, 0, 0] * 2)) == [S, *a, E, O, *tok.encode("3"), X] * 2
    assert "<|output_start|>error<|output_end|>" in tok.decode(play(tok, S, *tok.encode("2**9"), E, *[0] * 20))

def test_an_output_can_never_become_a_special_token(tok):
    S, E = tok.special("python_start"), tok.special("python_end")
    expr = '"' + "".join(SPECIAL) + '"[0]'
    row = play(tok, S, *tok.encode(expr), E, *[0] * 3)
    assert tok.decode(row[-2:-1]) == "<" and row[-2] not in tok.special_ids

def test_tool_rows_and_plain_rows_share_a_batch(tok, engine):
    "A scripted model calls the tool in one row only; the other row is not disturbed."
    S, E = tok.special("python_start"), tok.special("python_end")
    script = {0: [S, *tok.encode("6*7"), E] + tok.encode("!") * 9, 1: tok.encode("hello") + tok.encode("?") * 20}
    e, step = make_engine(tok), iter(range(100))
    def scripted(new, cache):
        t = next(step)
        return torch.stack([torch.nn.functional.one_hot(torch.tensor(script[r][t]), tok.vocab_size) for r in (0, 1)]).float()
    e._next_logits = scripted
    e._cache = lambda rows, n: type("Cache", (), {"pos": 0, "max_len": 99})()
    out = e.generate([[tok.bos_id]] * 2, 12, temperature=0)
    assert "6*7<|python_end|><|output_start|>42<|output_end|>" in tok.decode(out[0])
    assert out[1] == script[1][:12]


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("kw", [dict(temperature=0), dict(temperature=1.0), dict(temperature=2.0, top_k=10)])
def test_rows_do_not_depend_on_their_batch(tok, kv, kw):
    e, rng = make_engine(tok, n_kv_head=kv), random.Random(0)
    prompts = [[tok.bos_id] + [rng.randrange(256) for _ in range(rng.randint(0, 62))] for _ in range(17)]
    alone = [e.generate([p], 50, seed=9 + r, **kw)[0] for r, p in enumerate(prompts)]
    assert e.generate(prompts, 50, seed=9, **kw) == alone
    assert e.generate(prompts, 50, seed=9, batch_size=3, **kw) == alone
    assert e.generate(prompts, 7, seed=9, **kw) == [a[:7] for a in alone]

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
    assert engine.score([]) == [] and len(engine.score([([1] * 64, [2])])) == 1

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

def test_bfloat16(tok):
    class Runtime:
        device = torch.device("cpu")
        def autocast(self): return torch.autocast("cpu", torch.bfloat16)
    full, half = make_engine(tok), make_engine(tok, runtime=Runtime())
    assert half._cache(1, 8).k.dtype == torch.bfloat16 and full._cache(1, 8).k.dtype == torch.float32
    pairs = [(tok.encode("hello"), tok.encode("你好世界"))] * 3
    for (a, _), (b, _) in zip(full.score(pairs), half.score(pairs)): assert a == pytest.approx(b, rel=.05)
    assert len(half.generate([[tok.bos_id], [1, 2, 3]], 10, temperature=0)) == 2
    assert not torch.is_autocast_enabled("cpu")

@pytest.mark.parametrize("kw,said", [
    (dict(prompts=[[]]), "prompt 0 is empty"), (dict(prompts=[[1], [1] * 65]), "prompt 1 has 65 tokens"),
    (dict(prompts=[[1, 9999]]), "prompt 0 holds a token id"), (dict(prompts=[[1]], temperature=-1), "temperature=-1"),
    (dict(prompts=[[1]], top_k=0), "top_k=0"), (dict(prompts=[[1]], max_tokens=-5), "max_tokens=-5"),
    (dict(prompts=[[1]], seed=[1, 2]), "2 seeds for 1 prompts")])
def test_bad_input(engine, kw, said):
    with pytest.raises(NanochatError, match=said.replace("[", r"\[")): engine.generate(**kw)

def test_bad_pairs_and_vocabulary(tok, engine):
    with pytest.raises(NanochatError, match="pair 0 has an empty prompt"): engine.score([([], [1])])
    with pytest.raises(NanochatError, match="pair 1 has 66 tokens"): engine.score([([1], [1]), ([1] * 60, [1] * 6)])
    with pytest.raises(NanochatError, match="vocab_size=500"): Engine(GPT(GPTConfig(1, 1, 1, 8, 500, 8)), tok)

def test_leaves_the_model_trainable(tok):
    e = make_engine(tok)
    e.generate([[tok.bos_id], [1, 2, 3]], 5)
    x = torch.tensor([[1, 2, 3]])
    e.model(x, x).backward()
    assert all(p.grad is not None for p in e.model.parameters())
