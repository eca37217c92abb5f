"""The loader: what does not read well as a cell of its chapter."""
import itertools, json, os, random, shutil, signal, subprocess, sys, threading, time, zlib
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from hypothesis import given, settings, strategies as st

from nanochat_nb.data import iter_texts, write_shards
from nanochat_nb import loader as loader_module
from nanochat_nb.loader import (ChatLoader, DocStream, MixLoader, Prefetch, TextLoader, encode_flat, eval_batches, id_type,
                                prepare_cache)
from nanochat_nb.packing import Packer
from nanochat_nb.settings import NanochatError
from nanochat_nb.tokenizer import train_tokenizer
from nanochat_nb.world import World, conversations, corpus

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder of four shards, its documents, a tokenizer, conversations."
    folder, world = tmp_path_factory.mktemp("loader") / "data", World()
    docs = corpus(world, 120_000, seed=0)
    write_shards(docs, folder, source="world", chars_per_shard=40_000, val_fraction=0.05)
    tok = train_tokenizer((d["text"] for d in docs), 600)
    return folder, docs, tok, conversations(world, 120, seed=0)


def text(made, **kw): return TextLoader(made[0], made[2], **(dict(seq_len=48, batch_rows=8) | kw))
def chat(made, **kw): return ChatLoader(made[3], made[2], **(dict(seq_len=160, batch_rows=8) | kw))
def mix(made, **kw): return MixLoader(text(made, seq_len=160, batch_rows=4, **kw), chat(made, batch_rows=8, **kw))


def group(make, made, world_size, state=None):
    "Endless global batches, put together from what every rank gets."
    ranks = [make(made, rank=r, world_size=world_size) for r in range(world_size)]
    for loader in ranks:
        if state: loader.load_state_dict(json.loads(json.dumps(state)))
    while True:
        parts = [next(loader) for loader in ranks]
        yield tuple(torch.stack(p, dim=1).flatten(0, 1) for p in zip(*parts))


def same(a, b, n):
    for (x, y), (u, v) in itertools.islice(zip(a, b), n): assert torch.equal(x, u) and torch.equal(y, v)


@pytest.mark.parametrize("make", [text, chat, mix])
@pytest.mark.parametrize("world_size", [2, 4])
def test_same_global_batches_for_any_number_of_ranks(made, make, world_size):
    same(group(make, made, 1), group(make, made, world_size), 40)


@pytest.mark.parametrize("make", [text, chat, mix])
@pytest.mark.parametrize("seed", range(4))
def test_resume_is_exact_on_another_number_of_ranks(made, make, seed):
    rng = random.Random(seed)
    before, after = rng.choice([1, 2, 4]), rng.choice([1, 2, 4])
    loader = make(made, rank=before - 1, world_size=before)   # the state is the same on every rank
    steps = rng.randrange(0, 60)
    for _ in range(steps): next(loader)
    whole = group(make, made, 1)
    for _ in range(steps): next(whole)
    same(whole, group(make, made, after, loader.state_dict()), 25)


def test_state_does_not_depend_on_the_rank_and_survives_loading(made):
    a, b = text(made), text(made, rank=1, world_size=2)
    for _ in range(17): next(a); next(b)
    assert a.state_dict() == b.state_dict()
    c = text(made)
    c.load_state_dict(a.state_dict())
    assert c.state_dict() == a.state_dict()
    assert c.tokens_seen == 17 * 8 * 48 and len(json.dumps(a.state_dict())) < 10_000


def test_other_seeds_and_epochs_give_other_orders(made):
    assert not torch.equal(next(text(made))[0], next(text(made, seed=1))[0])
    loader = text(made, batch_rows=1)
    order = {}
    while loader.epoch < 3:
        for place, *_ in loader.next_row():
            shard, rows = loader.stream.span(place, 1)
            order.setdefault(place // loader.stream.n_docs, []).append((shard, int(rows[0])))
    assert order[0] != order[1] and loader.epoch == 3


def test_every_token_exactly_once_an_epoch(made):
    folder, _, tok, _ = made
    loader = text(made, batch_rows=1)
    length = {(s, r): len(tok.encode(t)) for s, sh in enumerate(loader.stream.shards)
              for r, t in enumerate(loader.stream.texts(s, list(range(sh["rows"]))))}
    read, n_docs = {}, loader.stream.n_docs
    while loader.epoch < 2:
        for place, ids, first, n in loader.next_row():
            shard, rows = loader.stream.span(place, 1)
            key = (place // n_docs, shard, int(rows[0]))
            assert read.get(key, 0) == first        # pieces follow one another
            read[key] = first + n
    for epoch in (0, 1): assert {k: read.get((epoch, *k)) for k in length} == length


def test_tokens_are_those_of_the_documents(made):
    folder, _, tok, _ = made
    loader, twin = text(made, batch_rows=4), text(made, batch_rows=4)
    for _ in range(20):
        x, y = next(loader)
        for r in range(4):
            row = [i for _, ids, a, n in twin.next_row() for i in (tok.bos_id, *ids[1:][a:a + n].tolist())]
            assert x[r].tolist() == row[:-1] and y[r].tolist() == row[1:]


@settings(max_examples=150, deadline=None)
@given(lens=st.lists(st.integers(0, 90), min_size=1, max_size=80), row_len=st.integers(2, 40), buffer=st.integers(1, 30))
def test_packer_loses_nothing(lens, row_len, buffer):
    p, todo, seen, rows = Packer(row_len), list(enumerate(lens)), [0] * len(lens), 0
    done = set()
    while True:
        while todo and (len(p) < buffer or p.tokens < row_len):
            d, n = todo.pop(0)
            p.add(d, None, n)
        if p.tokens < row_len: break
        oldest = p.oldest()
        row = p.row()
        assert row[0][0] == oldest                                # the queue moves
        assert sum(n + 1 for *_, n in row) == row_len             # full, no padding
        for d, _, first, n in row:
            assert first == seen[d] and d not in done             # in order, nothing twice
            seen[d] += n
            if seen[d] == lens[d] and d not in [i[0] for i in p.queue if i[1]]: done.add(d)
        rows += 1
        cut = [d for d, _, first, n in row if first + n < lens[d]]
        assert not cut or cut == [row[-1][0]]                     # a cut only ever ends a row
    left = {d: lens[d] - offset for d, left, offset, _ in p.queue if left}
    assert all(seen[d] + left.get(d, 0) == lens[d] for d in range(len(lens)))
    assert p.tokens == sum(n + 1 for n in left.values()) < row_len


@pytest.mark.parametrize("cut", [True, False])
def test_a_packer_made_from_what_is_buffered_goes_on_the_same(cut):
    rng, row_len, buffer = random.Random(0), 256, 300
    size = lambda d: min(int(random.Random(d).lognormvariate(4.5, 1.2)), row_len - 1 if not cut else 3000)
    def fill(p, at):
        while len(p) < buffer or p.tokens < 2 * row_len: p.add(at, None, size(at)); at += 1
        return at
    p, at = Packer(row_len), 0
    for _ in range(60):
        for _ in range(rng.randrange(40)): at = fill(p, at); p.row(cut)
        again, place, was = Packer(row_len), at, p.buffered()
        for d, offset in (map(int, x.split(":")) for x in was.split()): again.add(d, None, size(d), offset)
        for _ in range(30):
            at, place = fill(p, at), fill(again, place)
            assert p.row(cut) == again.row(cut) and at == place
        assert p.buffered() == again.buffered()


@settings(max_examples=100, deadline=None)
@given(lens=st.lists(st.integers(0, 29), min_size=1, max_size=80), buffer=st.integers(1, 30))
def test_packer_without_cutting_keeps_documents_whole(lens, buffer):
    p, todo, out = Packer(30), list(enumerate(lens)), []
    while todo or len(p):
        while todo and len(p) < buffer: p.add(todo[0][0], None, todo.pop(0)[1])
        row = p.row(cut=False)
        assert sum(n + 1 for *_, n in row) <= 30
        out += [(d, n) for d, _, first, n in row]
    assert sorted(out) == list(enumerate(lens))


def test_every_conversation_once_an_epoch_and_no_row_without_target(made):
    loader = chat(made, seq_len=600, batch_rows=1)
    seen = {}
    while loader.epoch < 2:
        row = loader.next_row()
        assert any(m for _, (_, mask), *_ in row for m in mask)
        for place, *_ in row: seen.setdefault(place // 120, []).append(loader.number(place))
    for epoch in (0, 1): assert sorted(seen[epoch]) == list(range(120))
    assert loader.n_cut == loader.n_dropped == 0


def test_chat_targets_are_the_next_input_or_nothing(made):
    loader = chat(made)
    for _ in range(40):
        x, y = next(loader)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, 160)
        assert (y >= 0).any(1).all() and (x[:, 0] == made[2].bos_id).all()
        assert ((y == -1) | (y == torch.cat([x[:, 1:], y[:, -1:]], 1))).all()


def conversation(*turns): return {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 9, turns)]}


def test_supervised_tokens_are_the_assistants_words(made):
    tok, want = made[2], set()
    chats = [conversation(f"问题 {i}？ question", f"回答 {i}。 answer", "再来", f"好的 {i} ok") for i in range(50)]
    for i in range(50): want |= {f"回答 {i}。 answer", f"好的 {i} ok"}
    loader, got = ChatLoader(chats, tok, seq_len=300, batch_rows=2), []
    while loader.epoch < 1:
        _, y = next(loader)
        got += tok.decode([i for i in y.flatten().tolist() if i >= 0]).split("<|assistant_end|>")
    assert set(got) - {""} == want


def test_long_conversations_end_at_a_turn(made):
    tok = made[2]
    one = conversation("你好", "好！")
    three = conversation(*[m["content"] for m in one["messages"]] * 3)
    n = len(tok.render(one)[0])
    for T, want in ((3 * n, three), (n + 5, one), (n - 1, one)):
        loader = ChatLoader([three], tok, seq_len=T, batch_rows=1)
        x, y = next(loader)
        ids, mask = tok.render(want)
        assert x[0, :len(ids)].tolist() == ids[:T] and y[0, :len(ids) - 1].tolist() == [i if m else -1 for i, m in zip(ids, mask)][1:]
        assert loader.n_cut == (want is not three) and loader.n_dropped == 0
    answer = len(tok.render({"messages": one["messages"][:1]})[0]) + 1   # up to <|assistant_start|>
    assert ChatLoader([one], tok, seq_len=answer, batch_rows=1).fit(0)[0][1][-1] == 1   # one word of the answer is left
    assert ChatLoader([one], tok, seq_len=answer - 1, batch_rows=1).fit(0) == (None, True)
    mixed = ChatLoader([one, conversation("长" * 500, "短")], tok, seq_len=n, batch_rows=1)
    for _ in range(5): next(mixed)
    assert (mixed.n_cut, mixed.n_dropped) == (0, 1)


def test_mix_rows(made):
    x, y = next(mix(made))
    a, b = next(chat(made)), next(text(made, seq_len=160, batch_rows=4))
    assert torch.equal(x, torch.cat([a[0], b[0]])) and torch.equal(y, torch.cat([a[1], b[1]]))
    m = mix(made)
    next(m)
    assert m.tokens_seen == 12 * 160 and m.epoch == 0 and m.n_cut == m.chat.n_cut and m.last_ms > 0
    with pytest.raises(NanochatError, match="seq_len=48, the chat loader seq_len=160"): MixLoader(text(made), chat(made))


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_eval_batches_are_the_documents_of_one_language(made, lang):
    folder, _, tok, _ = made
    batches = eval_batches(folder, tok, lang=lang, seq_len=64, batch_rows=2, n_tokens=10**6)
    ids = [i for t in iter_texts(folder, "val", lang) for i in (tok.bos_id, *tok.encode(t))]
    assert [i for _, y in batches for i in y.flatten().tolist() if i >= 0] == ids[1:]
    assert [i for x, _ in batches for i in x.flatten().tolist()][:len(ids) - 1] == ids[:-1]
    few = eval_batches(folder, tok, lang=lang, seq_len=64, batch_rows=2, n_tokens=129)
    assert len(few) == 2 and all(torch.equal(a, b) for f, g in zip(few, batches) for a, b in zip(f, g))


def test_tiny_corpora_still_fill_batches(made, tmp_path):
    write_shards(made[1][:6], tmp_path / "tiny", source="tiny")
    loader = TextLoader(tmp_path / "tiny", made[2], seq_len=512, batch_rows=2)
    assert next(loader)[0].shape == (2, 512) and loader.epoch > 0
    english = [d for d in made[1] if d["lang"] == "en"][:20]
    write_shards(english, tmp_path / "en", source="en")
    assert eval_batches(tmp_path / "en", made[2], lang="zh", seq_len=8, batch_rows=2, n_tokens=9) == []
    assert next(ChatLoader(made[3][:1], made[2], seq_len=512, batch_rows=4))[1].max() >= 0


def test_errors_name_the_thing_and_the_remedy(made, tmp_path):
    folder, _, tok, chats = made
    def fails(match, make):
        with pytest.raises(NanochatError, match=match): make()
    fails(r"batch_rows=6 .* world_size=4 .* use batch_rows=8", lambda: text(made, batch_rows=6, world_size=4))
    fails("rank=4 is not one of the ranks 0…3", lambda: chat(made, rank=4, world_size=4))
    fails("seq_len=0", lambda: text(made, seq_len=0))
    fails("workers=-1", lambda: text(made, workers=-1))
    fails("no documents of split 'test'", lambda: text(made, split="test"))
    fails("no manifest.json", lambda: TextLoader(tmp_path, tok, seq_len=8, batch_rows=1))
    fails("lang='fr'", lambda: eval_batches(folder, tok, lang="fr", seq_len=8, batch_rows=1, n_tokens=9))
    fails("no conversations", lambda: ChatLoader([], tok, seq_len=8, batch_rows=1))
    fails("none of 120 conversations .* longer seq_len", lambda: next(chat(made, seq_len=2)))
    fails("conversation 0: message 0: role 'assistant'",
          lambda: next(ChatLoader([{"messages": [{"role": "assistant", "content": "?"}]}], tok, seq_len=8, batch_rows=1)))
    state = text(made).state_dict()
    fails("seed=0, this loader has 1; use the same seed", lambda: text(made, seed=1).load_state_dict(state))
    fails("kind='text'", lambda: chat(made).load_state_dict(state))
    fails("use the same text_share", lambda: chat(made).load_state_dict(mix(made).state_dict()))
    fails("use the same text_share", lambda: mix(made).load_state_dict(chat(made).state_dict()))


def test_damaged_shards(made, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(made[0], broken)
    name = DocStream(broken).shards[0]["name"]
    whole = (broken / name).read_bytes()
    def run():
        loader = TextLoader(broken, made[2], seq_len=48, batch_rows=8)
        while loader.epoch < 1: next(loader)
    (broken / name).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(NanochatError, match=f"cannot read shard .*{name}.*prepare the data again"): run()
    table = pq.read_table(made[0] / name)
    bad = pa.array([b"\xff\xfe", *table["text"].to_pylist()[1:]], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), len(bad), bad.buffers())          # parquet does not look whether it is UTF-8
    pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", bad), broken / name)
    with pytest.raises(NanochatError, match=f"cannot read shard .*{name}.*UTF8.*prepare the data again"): run()
    (broken / name).unlink()
    with pytest.raises(NanochatError, match=f"lacks 1 of its shards: {name}"): run()
    manifest = json.loads((broken / "manifest.json").read_text(encoding="utf-8"))
    (broken / name).write_bytes(whole)
    for s in manifest["shards"]: s["rows"] += s["name"] == name
    (broken / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(NanochatError, match="its manifest says"): run()


# ---- workers, the token cache, restarts

@pytest.fixture(scope="module")
def cache(made, tmp_path_factory): return prepare_cache(made[0], made[2], str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("world_size, workers", [(1, 4), (2, 1)])
def test_same_global_batches_for_any_number_of_workers(made, world_size, workers):
    ours = group(lambda m, **kw: text(m, workers=workers, **kw), made, world_size)
    same(group(text, made, 1), ours, 30)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_same_global_batches_from_the_cache(made, cache, world_size):
    same(group(text, made, 1), group(lambda m, **kw: text(m, cache=cache, **kw), made, world_size), 60)   # more than an epoch
    a, b = text(made, split="val"), text(made, split="val", cache=cache)
    for _ in range(5): assert torch.equal(next(a)[1], next(b)[1])
    assert a.state_dict() == b.state_dict()


def test_worker_trouble_is_one_clear_error_and_no_worker_outlives_its_loader(made, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(made[0], broken)
    for s in DocStream(broken).shards: (broken / s["name"]).write_bytes(b"PAR1")
    with pytest.raises(NanochatError, match="cannot read shard .*prepare the data again"):
        next(TextLoader(broken, made[2], seq_len=48, batch_rows=8, workers=1))
    loader = text(made, workers=1)
    next(loader)
    os.kill(loader.pool.processes[0].pid, signal.SIGKILL)
    with pytest.raises(NanochatError, match="ended with status -9 .*fewer workers"):
        while True: next(loader)


def test_a_worker_killed_inside_a_chunk_is_an_error_and_prefetching_can_go_on(made, tmp_path):
    "Chunks larger than a pipe holds: the worker is killed with half of one written, and nobody may wait for the rest."
    fat = [dict(made[1][0], text="".join(d["text"] for d in made[1][i::16])) for i in range(16)]
    write_shards(fat, tmp_path / "fat", source="fat", val_fraction=0.05)
    ahead = Prefetch(TextLoader(tmp_path / "fat", train_tokenizer([], 265), seq_len=8, batch_rows=1, workers=1))
    next(ahead)
    state, pool, said = ahead.state_dict(), ahead.loader.pool, []
    assert len(encode_flat(ahead.loader.tokenizer, [fat[0]["text"]])[0]) * 2 < 2**16   # one fits, a few do not
    end = time.time() + 20
    while not pool.queues[0].full() and time.time() < end: time.sleep(0.01)
    time.sleep(0.3)                                                                    # the pipe fills up
    os.kill(pool.processes[0].pid, signal.SIGKILL)
    def drain():
        with pytest.raises(NanochatError, match="ended with status -9 .*fewer workers"):
            while True: next(ahead)
        said.append(1)
    thread = threading.Thread(target=drain, daemon=True)
    thread.start(); thread.join(60)
    assert said, "the reader waits for the rest of a chunk for ever"
    ahead.load_state_dict(state)                                                       # another worker, from there
    rest = TextLoader(tmp_path / "fat", ahead.loader.tokenizer, seq_len=8, batch_rows=1)
    rest.load_state_dict(state)
    for _ in range(3): assert torch.equal(next(ahead)[0], next(rest)[0])
    if ahead.loader.pool: ahead.loader.pool.close()


RUN = """
import json, sys, zlib
from nanochat_nb.loader import Prefetch, TextLoader
from nanochat_nb.tokenizer import Tokenizer
folder, tok, workers = sys.argv[1:]
if __name__ == "__main__":
    loader = Prefetch(TextLoader(folder, Tokenizer.load(tok), seq_len=48, batch_rows=8, workers=int(workers)))
    while True:
        x, y = next(loader)
        print(json.dumps([zlib.crc32(y.numpy().tobytes()), loader.state_dict()]), flush=True)
        if workers != "0": print(loader.loader.pool.processes[0].pid, file=sys.stderr, flush=True)
"""


def test_resume_is_exact_after_a_kill(made, tmp_path):
    "A process with a worker is killed; from its last state another goes on with the very next batch, and the worker is gone."
    made[2].save(tmp_path / "tok"); (tmp_path / "run.py").write_text(RUN)
    p = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(made[0]), str(tmp_path / "tok"), "1"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    lines = [p.stdout.readline() for _ in range(12)]
    worker = int(p.stderr.readline())
    p.kill(); p.wait()
    sums, states = zip(*map(json.loads, lines))
    whole = text(made)
    assert [zlib.crc32(next(whole)[1].numpy().tobytes()) for _ in range(12)] == list(sums)
    for k in (3, 11):
        loader = text(made)
        loader.load_state_dict(states[k])
        if k < 11: assert zlib.crc32(next(loader)[1].numpy().tobytes()) == sums[k + 1]
        else: assert torch.equal(next(loader)[1], next(whole)[1])
    end = time.time() + 20
    while Path(f"/proc/{worker}").exists() and "\nState:\tZ" not in Path(f"/proc/{worker}/status").read_text():
        assert time.time() < end, "the worker outlives its parent"
        time.sleep(0.05)


def test_a_cache_that_does_not_fit_is_an_error(made, cache, tmp_path):
    folder, docs, tok, _ = made
    def fails(match, f):
        with pytest.raises(NanochatError, match=match): f()
    other = train_tokenizer((d["text"] for d in docs[:200]), 500)
    fails("another tokenizer .*make it again: python -m nanochat_nb.loader", lambda: text((folder, docs, other), cache=cache))
    write_shards(docs[:300], tmp_path / "less", source="less", val_fraction=0.05)
    fails("another data", lambda: text((tmp_path / "less", docs, tok), cache=cache))
    fails("no token cache in", lambda: text(made, cache=tmp_path))
    copy = tmp_path / "base" / "tokenized_data"
    shutil.copytree(cache, copy)
    first = copy / "train" / "tokens_00000.bin"
    whole = first.read_bytes()
    first.write_bytes(whole[:-2])
    fails(r"tokens_00000.bin has [\d,]+ bytes instead of", lambda: text(made, cache=copy))
    first.write_bytes(whole[:-2] + tok.bos_id.to_bytes(2, "little"))
    def read():
        loader = text(made, cache=copy)
        while loader.epoch < 1: next(loader)
    fails(r"tokens_00000.bin holds \d+ documents, not", read)
    first.write_bytes(whole)
    running = text(made, cache=copy)
    next(running)
    fails("another tokenizer", lambda: prepare_cache(folder, other, str(tmp_path / "base")))
    prepare_cache(folder, other, str(tmp_path / "base"), mend=True)
    text((folder, docs, other), cache=copy)
    def go_on():
        while running.epoch < 1: next(running)
    other600 = train_tokenizer((d["text"] for d in docs[:200]), 600)      # of the same size, so the same bos
    prepare_cache(folder, other600, str(tmp_path / "base"), mend=True)
    fails(r"holds .* and [\d,]+ tokens, not [\d,]+; make it again", go_on)


def test_a_cache_half_written_is_no_cache(made, tmp_path, monkeypatch):
    made_of, calls = loader_module.encode_flat, []
    def dies(*a):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return made_of(*a)
    monkeypatch.setattr(loader_module, "encode_flat", dies)
    with pytest.raises(KeyboardInterrupt): prepare_cache(made[0], made[2], str(tmp_path))
    assert not list(tmp_path.rglob("manifest.json")) and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    assert torch.equal(next(text(made))[0], next(text(made, cache=prepare_cache(made[0], made[2], str(tmp_path))))[0])


def test_the_command_makes_the_cache(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "base_data/world"); made[2].save(tmp_path / "tokenizer")
    loader_module.main(loader_module.LoaderSettings(source="world", base_dir=str(tmp_path)))
    a, b = text(made), text(made, cache=tmp_path / "tokenized_data")
    for _ in range(3): assert torch.equal(next(a)[0], next(b)[0])
    p = subprocess.run([sys.executable, "-m", "nanochat_nb.loader", "--source=world", f"--base_dir={tmp_path}"],
                       capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    said = json.loads(p.stdout.splitlines()[-1])
    assert p.returncode == 0 and said["rows"] == len(made[1]) and said["bytes"] == 2 * said["tokens"]


def test_the_fast_encoder_gives_the_same_tokens(made):
    pytest.importorskip("numba")
    tok, rng = made[2], random.Random(0)
    pool = [chr(c) for c in [*range(0x250), *range(0x4e00, 0x4e40), 0x20000, 0x1F600, 0x200d, 0x3000, 0x0e33, 0x0301, 0xa0, 0x2028]]
    texts = ["".join(rng.choices([*pool, "\r\n", "  ", " 's", "中文", "<|bos|>"], k=60)) for _ in range(2000)] + [""]
    flat, a, b = encode_flat(tok, texts)
    assert tok._encoder
    assert [flat[i:j].tolist() for i, j in zip(a, b)] == [[tok.bos_id, *tok.encode(t)] for t in texts]


@pytest.mark.parametrize("seq_len, most", [(2048, 0.02), (512, 0.05)])
def test_next_to_nothing_is_lost_or_padded(seq_len, most):
    "Lengths of real text (log-normal, heavy tail): what goes in comes out, rows are full, documents that fit stay whole."
    rng = random.Random(0)
    lens = [int(rng.lognormvariate(6.2, 1.1)) for _ in range(8000)]
    p, todo, read, cut, fit = Packer(seq_len + 1), list(enumerate(lens))[::-1], 0, 0, 0
    while todo:
        while todo and len(p) < 512: d, n = todo.pop(); p.add(d, None, n)
        row = p.row()
        assert sum(n + 1 for *_, n in row) == seq_len + 1
        read += sum(n for *_, n in row)
        whole = [(lens[d], n) for d, _, first, n in row if not first and lens[d] <= seq_len]
        fit += len(whole); cut += sum(a != b for a, b in whole)
    waiting = sum(left - 1 for _, left, *_ in p.queue if left)
    assert 1 - (read + waiting) / sum(lens) <= most and read + waiting == sum(lens)
    assert cut / fit < 0.005


# ---- what a state and a cache rest on

def test_what_was_cut_and_dropped_is_still_counted_after_a_resume(made):
    a, b = (chat(made, seq_len=60) for _ in "ab")
    for _ in range(6): next(a)
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert a.n_cut and a.n_dropped and b.state_dict() == a.state_dict() and (b.n_cut, b.n_dropped) == (a.n_cut, a.n_dropped)


def test_a_state_of_other_text_other_conversations_or_another_tokenizer_is_refused(made, tmp_path):
    folder, docs, tok, chats = made
    def refused(what, loader, state):
        with pytest.raises(NanochatError, match=f"made with {what}="): loader.load_state_dict(state)
    other = train_tokenizer((d["text"] for d in docs[:200]), 600)                  # of the same size
    assert other.vocab_size == tok.vocab_size and other.hash != tok.hash
    shutil.copytree(folder, tmp_path / "other")                                    # as many rows under the same names
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for s in manifest["shards"]: s["sha256"] = "0" * 64
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    refused("data", text((tmp_path / "other", docs, tok)), text(made).state_dict())
    refused("tokenizer", text((folder, docs, other)), text(made).state_dict())
    refused("data", chat((folder, docs, tok, chats[::-1])), chat(made).state_dict())
    refused("tokenizer", chat((folder, docs, other, chats)), chat(made).state_dict())


def test_the_documents_of_a_shard_stand_in_another_order_every_epoch(made):
    stream, order = DocStream(made[0]), {}
    for epoch in (0, 1):
        place = epoch * stream.n_docs
        while place < (epoch + 1) * stream.n_docs:
            shard, rows = stream.span(place, 10**9)
            order[epoch, shard] = rows.tolist()
            place += len(rows)
    for i, s in enumerate(stream.shards):
        assert sorted(order[0, i]) == sorted(order[1, i]) == list(range(s["rows"])) and order[0, i] != order[1, i]


def test_ids_beyond_sixteen_bits_keep_their_value():
    from types import SimpleNamespace
    assert id_type(SimpleNamespace(vocab_size=2**16)) is np.uint16 and id_type(SimpleNamespace(vocab_size=2**16 + 1)) is np.uint32
