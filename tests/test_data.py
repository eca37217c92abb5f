"Data: bad input, faults of the network, kills and interrupts, what does not read well in the chapter."
import csv, dataclasses, errno, json, os, random, signal, subprocess, sys, tempfile, threading, time
from collections import Counter
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings as settings_, strategies as st
from nanochat_nb import data, fetch, world
from nanochat_nb.data import *
from nanochat_nb.settings import NanochatError, read_json
from test_fetch import hurry, start_hub

ROOT = Path(__file__).parent.parent
DOCS = world.corpus(world.World(seed=0, n_people=20), n_chars=60_000, seed=0)


def says(text, f, *args, **kw):
    with pytest.raises(NanochatError) as e: f(*args, **kw)
    assert text in str(e.value), str(e.value)


def cli(*args, **kw):
    return subprocess.run([sys.executable, "-m", "nanochat_nb.data", *map(str, args)], capture_output=True, text=True, cwd=ROOT, **kw)


# ---- the parameters cell and the command

def test_parameters_cell_is_the_dataclass():
    cells = json.loads((ROOT / "nbs/00_data.ipynb").read_text(encoding="utf-8"))["cells"]
    cell = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    src = next("".join(c["source"]) for c in cells if "class DataSettings" in "".join(c["source"]))
    fields = [line.strip() for line in src.splitlines() if line.startswith("    ") and "#" in line]
    assert len(cell) == 1 and cell[0].splitlines() == fields and len(fields) == len(dataclasses.fields(DataSettings))


def test_command_prepares_verifies_and_reports(tmp_path):
    run = cli("--n_people", 20, "--n_chars", 50_000, "--base_dir", tmp_path)
    out = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == 0 and out["shards"] == 2 and out["characters"] >= 50_000, run.stderr
    assert cli("--verify", "--base_dir", tmp_path).returncode == 0
    shard = tmp_path / "base_data/world/shard_00001.parquet"
    raw = bytearray(shard.read_bytes()); raw[100] ^= 1; shard.write_bytes(raw)
    run = cli("--verify", "--base_dir", tmp_path)
    assert run.returncode == 2 and "shard_00001.parquet: altered" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("args,say", [(("--source", "wrold"), "did you mean 'world'"), (("--sorce", "x"), "did you mean 'source'"),
                                      (("--verify", "--source", "pypi"), "no manifest.json"), (("--val_fraction", "2"), "val_fraction")])
def test_command_errors_are_one_line(args, say, tmp_path):
    run = cli(*args, "--base_dir", tmp_path)
    assert run.returncode == 2 and say in run.stderr and len(run.stderr.splitlines()) == 1


# ---- reading

def test_bad_documents(tmp_path):
    def doc(name, body): (tmp_path / name).write_bytes(body.encode() if isinstance(body, str) else body); return tmp_path / name
    def read(p): return list(read_documents(p))
    says("line 2: 'text' is NoneType, expected a string; conversations", read, doc("c.jsonl", '\n{"messages": []}\n'))
    says("line 1: expected an object, found list", read, doc("l.jsonl", "[1]"))
    says("line 2: not valid JSON", read, doc("b.jsonl", '{"text": "a"}\n{"text": '))
    says("line 1: holds half a surrogate", read, doc("s.jsonl", '{"text": "\\ud800"}'))
    says("line 2: not UTF-8", read, doc("g.txt", "好\n".encode() + "好".encode("gb18030")))
    says("expected a name that ends in", read, doc("x.doc", "a"))
    says("line 3: 'text' is NoneType", read, doc("x.csv", "id,text\n1,a\n2"))
    says("x.csv line 2: not UTF-8", read, doc("x.csv", b"text\n" + "好".encode("gb18030")))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    says("row 2: 'text' is NoneType", read, tmp_path / "null.parquet")
    says("row 2: 'text' is NoneType", lambda p: list(text_tables(p)), tmp_path / "null.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "col.parquet")
    says("no column 'text' (its columns: body)", read, tmp_path / "col.parquet")
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"text": not_utf8}), tmp_path / "utf.parquet")
    says("utf.parquet is damaged or cut short (Invalid UTF8", lambda p: list(text_tables(p)), tmp_path / "utf.parquet")
    says("damaged or cut short", read, doc("cut.parquet", (tmp_path / "null.parquet").read_bytes()[:100]))
    says("damaged or cut short", read, doc("none.parquet", b""))
    says("damaged or cut short", read, tmp_path / "utf.parquet")
    says("is missing", read, tmp_path / "gone.parquet")
    for name in ("gone.txt", "gone.jsonl", "gone.csv"): says(f"{name} cannot be read: No such file", read, tmp_path / name)
    says("gone.jsonl cannot be read", read_conversations, tmp_path / "gone.jsonl")


def test_a_file_that_may_not_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    "Nobody should be told to delete a good file."
    def denied(path): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(pq, "ParquetFile", denied)
    with pytest.raises(NanochatError) as e: list(read_documents(tmp_path / "a.parquet"))
    assert str(e.value) == f"{tmp_path}/a.parquet cannot be read: Permission denied"


@pytest.mark.parametrize("columns", [{"text": pa.array(["好的好的", "abc"]).dictionary_encode()}, {"text": pa.array(["好的好的", "abc"], pa.string_view())}] + [
    {"text": ["好的好的", "abc"], "lang": x} for x in ([1, 2], [["zh"], ["en"]], pa.array(["zh", "fr"]).dictionary_encode(), pa.array(["en", None], pa.large_string()))])
def test_columns_of_any_type_are_read_and_not_called_damaged(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    docs = list(read_documents(tmp_path / "a.parquet"))
    assert [d["text"] for d in docs] == ["好的好的", "abc"] and pa.concat_tables(text_tables(tmp_path / "a.parquet")).to_pylist() == docs
    pq.write_table(pa.table({"text": [b"abc", None]}), tmp_path / "b.parquet")
    says("row 1: 'text' is bytes", list, text_tables(tmp_path / "b.parquet"))


def test_four_kinds_of_file_and_whole_columns_say_the_same(tmp_path):
    texts = ["第一篇，\n带引号\"的", "second, one", "三\u3000\r\n", "\u3000\x1c\n", "", "tail"]
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as f: csv.writer(f).writerows([["id", "content"], *enumerate(texts)])
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"content": t}) for t in texts))
    pq.write_table(pa.table({"content": pa.array(texts, pa.large_string()), "n": range(6)}), tmp_path / "a.parquet")
    for kind in ("csv", "jsonl", "parquet"):
        got = list(read_documents(tmp_path / f"a.{kind}"))
        assert [d["text"] for d in got] == [t for t in texts if t.strip()], kind
        assert pa.concat_tables(text_tables(tmp_path / f"a.{kind}")).to_pylist() == got


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30) | st.text("好的abcÉ，。①ア한𠀀 1", max_size=60), max_size=8))
@settings_(derandomize=True, max_examples=150, deadline=None)
def test_languages_of_a_column_are_those_of_its_texts(texts):
    assert langs_of(pa.array(texts, pa.string())).to_pylist() == [lang_of(t) for t in texts]
    spaced = pa.array(["x", *texts], pa.string())
    assert langs_of(spaced.slice(1)).to_pylist() == [lang_of(t) for t in texts]


def test_blank_is_what_python_calls_blank():
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    assert data._column_table(pa.array(every), pa.nulls(len(every), pa.string()))["text"].to_pylist() == [c for c in every if c.strip()]


def test_bom_and_empty_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "好"}\r\n\n{"text": "  "}\r\n{"text": "b", "lang": "zh"}\n{"text": "c", "lang": "fr"}', encoding="utf-8")
    assert list(read_documents(tmp_path / "a.jsonl")) == [{"text": "好", "lang": "zh"}, {"text": "b", "lang": "zh"}, {"text": "c", "lang": "en"}]


def test_damage_in_the_middle_of_a_shard_is_an_error_not_bad_text(tmp_path):
    write_shards(DOCS, tmp_path / "a", source="x")
    shard = shard_paths(tmp_path / "a", "train")[0]
    raw = bytearray(shard.read_bytes()); raw[2000:3000] = bytes(1000); shard.write_bytes(raw)
    says("damaged", list, iter_texts(tmp_path / "a"))


def test_conversations(tmp_path):
    u, v = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    def read(*rows):
        (tmp_path / "c.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
        return read_conversations(tmp_path / "c.jsonl")
    def bad(say, *messages): says(say, read, {"messages": [u, v]}, {"messages": list(messages)})
    ok = [{"messages": [{"role": "system", "content": "be kind"}, u, v, u]},
          {"messages": [u, {"role": "assistant", "content": [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]}]}]
    assert read(*ok) == ok
    bad("line 2: expected at least one user")
    bad("line 2, message 2: role is 'user', expected 'assistant'", u, u)
    bad("line 2, message 1: role is 'assistant', expected 'user'", v, u)
    bad("line 2, message 3: role is 'system'", u, v, {"role": "system", "content": ""})
    bad("line 2, message 2: content must be", u, {"role": "assistant"})
    bad("line 2, message 1: content must be", {"role": "user", "content": [{"type": "text", "text": "a"}]}, v)
    bad("line 2, message 2: content must be", u, {"role": "assistant", "content": [{"type": "image", "text": ""}]})
    bad("line 2: expected a list 'messages'", "hi", "ho")
    for half in ("\ud83d", [{"type": "text", "text": "a\udc00"}]): bad("line 2, message 2: content must be", u, {"role": "assistant", "content": half})
    assert read({"messages": [u, {"role": "assistant", "content": "😀𠀀"}]})                                # whole pairs are fine
    says("line 1: expected a list", read, {"text": "a"})
    says("line 2: not valid JSON", read, {"messages": [u, v]}, '{"messages": ')
    says("holds no conversation", read)


def test_any_row_of_a_shard_can_be_looked_at(tmp_path):
    pq.write_table(pa.table({"content": [f"第{i}篇 <b>" for i in range(25)]}), tmp_path / "a.parquet", row_group_size=10)
    assert [read_row(tmp_path / "a.parquet", i) for i in range(25)] == list(read_documents(tmp_path / "a.parquet"))
    for i in (-1, 25): says("has 25 rows, the first is 0", read_row, tmp_path / "a.parquet", i)
    write_shards([{"text": f"<script>{i}"} for i in range(2000)], tmp_path / "s", source="x")
    window = browse(tmp_path / "s")
    (pick, row), shown = window.children[0].children, window.children[1]
    row.value = 1500
    assert "&lt;script&gt;" in shown.value and read_row(shard_paths(tmp_path / "s", "train")[0], 1500)["text"][8:] in shown.value
    pick.value = pick.options[-1]                                    # fewer rows there: the last one is shown
    assert row.value == read_manifest(tmp_path / "s")["shards"][-1]["rows"] - 1


# ---- split and shards

def test_split_sizes():
    def en(n, same=False): return [{"text": "x" if same else str(i), "lang": "en"} for i in range(n)]
    assert [sum(choose_val(en(n))) for n in (2, 20, 1000, 10_000)] == [1, 2, 64, 100]
    assert [sum(choose_val(en(n), fraction=.5)) for n in (2, 100)] == [1, 50]
    assert choose_val(DOCS, seed=1) != choose_val(DOCS, seed=2)
    assert set(choose_val(en(20, same=True))) == {True}               # copies stand together …
    says("at least two that differ", write_shards, en(20, same=True), "/nonexistent/x", source="x")
    says("20 documents, all held out", write_shards, en(20), "/nonexistent/x", source="x", val_fraction=0.99)


def test_same_input_same_bytes_and_row_groups(tmp_path):
    a, b = (write_shards(iter(DOCS), tmp_path / n, source="x", chars_per_shard=30_000) for n in "ab")
    assert a == b and [s["split"] for s in a["shards"]][-1] == "val" and len(a["shards"]) > 2
    many = write_shards([{"text": f"document {i}"} for i in range(3000)], tmp_path / "c", source="x")
    md = pq.ParquetFile(tmp_path / "c" / many["shards"][0]["name"]).metadata
    assert [md.row_group(g).num_rows for g in range(md.num_row_groups)] == [1024, 1024, 2936 - 2048]
    assert md.row_group(0).column(0).compression == "ZSTD"
    got = Counter(iter_texts(tmp_path / "a", "train")) + Counter(iter_texts(tmp_path / "a", "val"))
    assert got == Counter(d["text"] for d in DOCS)
    assert all(lang_of(t) == "zh" or "zh" not in t for t in iter_texts(tmp_path / "a", "val", "zh"))


def test_any_unicode_survives(tmp_path):
    rng = random.Random(0)
    texts = ["".join(chr(c) for c in rng.choices([*range(1, 0xD800), *range(0xE000, 0x110000, 7)], k=rng.randrange(1, 60))) for _ in range(300)]
    docs = [{"text": t} for t in texts if t.strip()]
    write_shards(docs, tmp_path / "u", source="x")
    assert Counter(t for s in ("train", "val") for t in iter_texts(tmp_path / "u", s)) == Counter(d["text"] for d in docs)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_interrupt_or_full_disk_leaves_the_old_folder(tmp_path, monkeypatch, error):
    m = write_shards(DOCS, tmp_path / "a", source="x", chars_per_shard=20_000)
    real = pq.ParquetWriter
    def fails(path, *args, **kw):
        if "00002" in str(path): raise error
        return real(path, *args, **kw)
    monkeypatch.setattr(pq, "ParquetWriter", fails)
    for name in ("a", "new"):
        with pytest.raises(NanochatError if isinstance(error, OSError) else KeyboardInterrupt) as e:
            write_shards(DOCS, tmp_path / name, source="x", chars_per_shard=20_000)
        assert isinstance(error, KeyboardInterrupt) or "No space left on device; free disk space" in str(e.value)
    assert read_manifest(tmp_path / "a") == m and verify(tmp_path / "a") == []
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_verify_names_every_problem(tmp_path):
    write_shards(DOCS, tmp_path / "a", source="x", chars_per_shard=15_000)
    p = shard_paths(tmp_path / "a", "train")
    raw = bytearray(p[0].read_bytes()); raw[50] ^= 1; p[0].write_bytes(raw)
    p[1].write_bytes(p[1].read_bytes()[:500]); p[2].unlink()
    assert [x.split(":")[1].split()[0] for x in verify(tmp_path / "a")] == ["altered", "500", "missing"]


@given(st.data())
@settings_(derandomize=True, max_examples=60, deadline=None)
def test_no_flipped_byte_escapes(drawn):
    with tempfile.TemporaryDirectory() as tmp:
        m = write_shards(DOCS[:40], Path(tmp) / "a", source="x", chars_per_shard=8_000)
        shard = drawn.draw(st.sampled_from(m["shards"]))
        raw, at = bytearray((Path(tmp) / "a" / shard["name"]).read_bytes()), drawn.draw(st.integers(0, shard["bytes"] - 1))
        raw[at] ^= drawn.draw(st.integers(1, 255))
        (Path(tmp) / "a" / shard["name"]).write_bytes(raw)
        assert verify(Path(tmp) / "a") == [f"{shard['name']}: altered (its sha256 is not the manifest's)"]


@given(st.lists(st.text("abc好的 ", min_size=1, max_size=6), min_size=2, max_size=40), st.integers(0, 3))
@settings_(derandomize=True, max_examples=60, deadline=None)
def test_splits_never_share_a_text(texts, seed):
    docs = [{"text": t, "lang": lang_of(t)} for t in texts]
    held = choose_val(docs, seed)
    assert not {t for t, v in zip(texts, held) if v} & {t for t, v in zip(texts, held) if not v}
    assert dict(zip(texts, held)) == dict(zip(texts[::-1], choose_val(docs[::-1], seed)[:: 1]))      # whatever the order


# ---- prepare

def test_folder_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for d in ("en", "zh", "zh/.hidden", "empty"): Path(d).mkdir()
    Path("en/a.jsonl").write_text("\n".join(json.dumps({"text": f"text number {i}"}) for i in range(50)))
    Path("zh/b.txt").write_text("第一篇。" * 100, encoding="utf-8")
    Path("zh/.hidden/c.txt").write_text("hidden")
    pq.write_table(pa.table({"text": [f"第{i}篇" for i in range(50)], "url": ["u"] * 50}), "zh/d.parquet")
    cfg = DataSettings(source="en, zh", base_dir=str(tmp_path / "base"))
    folder = prepare(cfg)
    assert folder.name.startswith("en-zh-") and sum(s["rows"] for s in read_manifest(folder)["shards"]) == 101
    assert prepare(dataclasses.replace(cfg, source=f"{tmp_path}/en,{tmp_path}/zh")) == folder      # the same place, said otherwise
    stamp = os.stat(folder / "manifest.json").st_mtime_ns
    prepare(cfg); assert os.stat(folder / "manifest.json").st_mtime_ns == stamp                    # kept
    Path("zh/b.txt").write_text("改过了。" * 100, encoding="utf-8")
    prepare(cfg); assert os.stat(folder / "manifest.json").st_mtime_ns > stamp                     # an input changed
    assert prepare(dataclasses.replace(cfg, source=str(folder))) == folder                         # shards made elsewhere
    assert prepare(dataclasses.replace(cfg, source="en/a.jsonl")).name.startswith("a-")
    says("holds no .parquet, .jsonl, .txt, .csv", prepare, dataclasses.replace(cfg, source="en,empty"))
    says("source is empty", prepare, dataclasses.replace(cfg, source=""))
    Path("zh/d.parquet").write_bytes(Path("zh/d.parquet").read_bytes()[:300])
    says("d.parquet is damaged or cut short", prepare, cfg)
    assert verify(folder) == []                                                                    # the old shards stand


def test_folders_that_are_named_like_files_and_names_in_capitals(tmp_path):
    "Spark writes a folder data.parquet of many parts; old systems write NOVEL.TXT."
    for d in ("in/data.parquet", "in/b.txt"): (tmp_path / d).mkdir(parents=True)
    for i in range(2): pq.write_table(pa.table({"text": [f"part {i} row {j}" for j in range(5)]}), tmp_path / f"in/data.parquet/part-{i}.PARQUET")
    (tmp_path / "in/b.txt/NOVEL.TXT").write_text("once upon a time")
    assert [p.name for p in source_files(str(tmp_path / "in"))] == ["NOVEL.TXT", "part-0.PARQUET", "part-1.PARQUET"]
    folder = prepare(DataSettings(source=str(tmp_path / "in"), base_dir=str(tmp_path)))
    assert sum(s["rows"] for s in read_manifest(folder)["shards"]) == 11
    assert sum(t.num_rows for t in text_tables(tmp_path / "in/data.parquet/part-0.PARQUET")) == 5


def test_sources_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("text")
    at = DataSettings(base_dir=str(tmp_path))
    says("world is no file or folder; nanochat_nb.repackage mixes", prepare, dataclasses.replace(at, source="world,fineweb-edu"))
    says("'~nobody-of-this-name/x' is no known source", prepare, dataclasses.replace(at, source="~nobody-of-this-name/x"))
    for other in ('{"name": "an extension"}', "[]", '{"shards": 3}'):                   # a manifest.json of another program
        (tmp_path / "in/manifest.json").write_text(other)
        says("in has no manifest.json that lists shards", read_manifest, prepare(dataclasses.replace(at, source=str(tmp_path / "in"))))
    (tmp_path / "half").mkdir()
    (tmp_path / "half/manifest.json").write_text('{"shards": [{"name": "shard_01822.parquet", "split": "val", "rows": 1}]}')
    says("no shard of split 'train'; prepare the source again", shard_paths, tmp_path / "half", "train")       # interrupted after the first
    says("no shard of split 'trian'; did you mean 'train'?", shard_paths, tmp_path / "half", "trian")


def test_base_data_that_cannot_be_written(tmp_path):
    cfg = DataSettings(base_dir=str(tmp_path), n_people=10, n_chars=5_000)
    (tmp_path / "base_data/.world.lock").mkdir(parents=True)
    says("base_data/world: Is a directory; choose another base_dir", prepare, cfg)
    (tmp_path / "file/base_data").parent.mkdir(); (tmp_path / "file/base_data").touch()
    says("file/base_data cannot be made", prepare, dataclasses.replace(cfg, base_dir=str(tmp_path / "file")))


def test_a_source_linked_to_a_larger_disk_stays_there(tmp_path):
    (tmp_path / "disk/world").mkdir(parents=True); (tmp_path / "base_data").mkdir()
    (tmp_path / "base_data/world").symlink_to(tmp_path / "disk/world")
    for n in (5_000, 6_000, 7_000): folder = prepare(DataSettings(base_dir=str(tmp_path), n_people=10, n_chars=n))
    assert folder.is_symlink() and verify(tmp_path / "disk/world") == [] and sorted(os.listdir(tmp_path / "base_data")) == [".world.lock", "world"]


def test_world_source_says_which_world(tmp_path):
    cfg = DataSettings(base_dir=str(tmp_path), n_people=20, n_chars=30_000, world_seed=3)
    r = read_manifest(prepare(cfg))["recipe"]
    assert (r["n_people"], r["n_chars"], r["world_seed"]) == (20, 30_000, 3)
    a = sorted(iter_texts(prepare(cfg)))
    assert a != sorted(iter_texts(prepare(dataclasses.replace(cfg, world_seed=4))))
    prepare(dataclasses.replace(cfg, seed=1))
    for kw in (dict(workers=0), dict(n_chars=0), dict(val_fraction=0.0), dict(val_fraction=1.0)):
        says(next(iter(kw)), prepare, dataclasses.replace(cfg, **kw))


def test_two_processes_make_a_source_once(tmp_path):
    args = [sys.executable, "-m", "nanochat_nb.data", "--n_people", "20", "--n_chars", "300000", "--base_dir", str(tmp_path)]
    runs = [subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    assert [r.wait() for r in runs] == [0] * 3
    assert len({r.stdout.read() for r in runs}) == 1 and verify(tmp_path / "base_data/world") == []
    assert sorted(p.name for p in (tmp_path / "base_data").iterdir()) == [".world.lock", "world"]


# ---- the hub

@pytest.fixture
def hub(tmp_path):
    s = start_hub()
    write_shards(DOCS, tmp_path / "made", source="x", chars_per_shard=6_000)
    made = sorted((tmp_path / "made").glob("*.parquet"))
    for i, p in zip([0, 1, 2, 3, 1822], made): s.files[f"shard_{i:05d}.parquet"] = p.read_bytes()
    yield s
    s.shutdown(); s.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "Pauses of milliseconds instead of seconds."
    hurry(monkeypatch)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


def settings(hub, tmp_path, **kw): return DataSettings(**{"source": "fineweb-edu", "base_dir": str(tmp_path), "n_shards": 3, "endpoint": hub.address} | kw)


@pytest.mark.parametrize("fault,redirect", [(f, 302) for f in ("", "429", "500", "503", "cut", "reset", "stall", "wrong")] + [("cut", 307), ("cut", 308)])
def test_every_fault_ends_in_whole_shards(hub, tmp_path, fault, redirect):
    hub.faults, hub.redirect = [fault] * 3, redirect
    folder = prepare(settings(hub, tmp_path))
    m = read_manifest(folder)
    assert [(s["name"], s["split"]) for s in m["shards"]] == [(f"shard_{i:05d}.parquet", "val" if i == 1822 else "train") for i in (0, 1, 2, 1822)]
    assert verify(folder) == [] and m["revision"] == "c0ffee" and m["licence"]
    assert {p.name: p.read_bytes() for p in folder.glob("shard*")} == {n: b for n, b in hub.files.items() if "00003" not in n}
    assert not list(folder.glob("*.part"))


def test_grows_reuses_and_mends(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.address + "/")                     # the one switch
    folder = prepare(settings(hub, tmp_path, endpoint="", n_shards=1, workers=1))
    assert len(hub.asked) == 2 and hub.asked[0][0] == "shard_01822.parquet"
    prepare(settings(hub, tmp_path, n_shards=3))
    assert len(hub.asked) == 4
    prepare(settings(hub, tmp_path, n_shards=2, endpoint="http://127.0.0.1:9"))     # there already: no network
    assert len(shard_paths(folder, "train")) == 3 and len(hub.asked) == 4
    a, b, c = shard_paths(folder, "train")
    a.unlink(); b.write_bytes(b.read_bytes()[:100])
    prepare(settings(hub, tmp_path, n_shards=3))
    assert verify(folder) == [] and len(hub.asked) == 6
    (folder / "manifest.json").unlink()                                       # killed before the manifest was written
    prepare(settings(hub, tmp_path, n_shards=3))
    assert len(hub.asked) == 6 and verify(folder) == []


def test_unknown_shards_and_endpoints(hub, tmp_path):
    says("has 1,822 training shards", prepare, settings(hub, tmp_path, n_shards=1823))
    says("n_shards=0", prepare, settings(hub, tmp_path, n_shards=0))
    says("6,542 training shards", prepare, settings(hub, tmp_path, source="climbmix", n_shards=-2))
    says("is no address", prepare, settings(hub, tmp_path, endpoint="hf-mirror.com"))
    says("HTTP 404", prepare, settings(hub, tmp_path, n_shards=10))            # the hub lacks shard 4
    m = read_manifest(tmp_path / "base_data/fineweb-edu")                      # what came is kept
    assert verify(tmp_path / "base_data/fineweb-edu") == [] and m["shards"][-1]["split"] == "val"


def test_the_validation_shard_is_named_and_each_shard_is_entered_as_it_comes(hub, tmp_path):
    hub.files |= {f"shard_{i:05d}.parquet": hub.files["shard_00002.parquet"] for i in range(4, 12)}
    folder, hub.delay, seen = tmp_path / "base_data/fineweb-edu", 0.05, []
    work = threading.Thread(target=prepare, args=[settings(hub, tmp_path, n_shards=12, workers=2)])
    work.start()
    while work.is_alive():
        if (folder / "manifest.json").exists(): seen.append([(s["name"][6:11], s["split"]) for s in read_manifest(folder)["shards"]])
        time.sleep(0.01)
    assert len({len(s) for s in seen}) > 3 and all(s[-1] == ("01822", "val") for s in seen)
    prepare(settings(hub, tmp_path, n_shards=2, endpoint="http://127.0.0.1:9"))


def test_two_processes_share_a_download(hub, tmp_path):
    hub.slow = 0.002
    args = [sys.executable, "-m", "nanochat_nb.data", "--source", "fineweb-edu", "--n_shards", "3", "--endpoint", hub.address, "--base_dir", str(tmp_path)]
    runs = [subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [r.wait(60) for r in runs] == [0] * 3 and len({r.stdout.read() for r in runs}) == 1
    folder = tmp_path / "base_data/fineweb-edu"
    assert verify(folder) == [] and sorted(os.listdir(folder)) == ["manifest.json"] + [f"shard_{i:05d}.parquet" for i in (0, 1, 2, 1822)]
    assert hub.sent == {p.name: p.stat().st_size for p in folder.glob("*.parquet")}


def test_verify_names_and_repair_fetches_just_those(hub, tmp_path):
    args = ["--source", "fineweb-edu", "--n_shards", 3, "--endpoint", hub.address, "--base_dir", tmp_path]
    folder = prepare(settings(hub, tmp_path))
    before = {p.name: p.read_bytes() for p in folder.glob("*.parquet")}
    a, b, c = shard_paths(folder, "train")
    a.unlink(); b.write_bytes(b.read_bytes()[:100]); raw = bytearray(c.read_bytes()); raw[77] ^= 8; c.write_bytes(raw)
    run = cli("--verify", *args)
    assert run.returncode == 2 and run.stderr.count(".parquet") == 3 and "--repair" in run.stderr
    hub.asked.clear()
    run = cli("--repair", *args)
    assert run.returncode == 0 and run.stdout.count("mended shard_0000") == 3, run.stderr
    assert sorted(n for n, _, _ in hub.asked) == [p.name for p in (a, b, c)]
    assert {p.name: p.read_bytes() for p in folder.glob("*.parquet")} == before and cli("--verify", *args).returncode == 0
    hub.files[a.name] = hub.files[b.name]; a.unlink()                          # the hub has another file there now
    says("not what the manifest told", repair, settings(hub, tmp_path))


def test_repair_makes_again_what_was_made_here_and_says_what_it_cannot(tmp_path):
    cfg = DataSettings(base_dir=str(tmp_path), n_people=20, n_chars=30_000)
    folder = prepare(cfg)
    m = read_manifest(folder)
    shard_paths(folder, "train")[0].write_bytes(b"")
    says("made elsewhere, by other settings", repair, dataclasses.replace(cfg, n_chars=40_000))
    assert [p.split(":")[0] for p in repair(cfg)] == ["shard_00000.parquet"] and verify(folder) == [] and read_manifest(folder) == m
    assert repair(cfg) == []
    shard_paths(folder, "val")[0].unlink()
    says("copy them anew", repair, DataSettings(source=str(folder), base_dir=str(tmp_path)))
    run = cli("--verify", "--source", folder, "--base_dir", tmp_path)
    assert run.returncode == 2 and "shard_00001.parquet: missing" in run.stderr


def test_preflight_of_a_recipe_of_several_sources(hub, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    def run(source, n=3): return cli("--preflight", "--source", source, "--n_shards", n, "--endpoint", hub.address, "--base_dir", tmp_path)
    ok = run(f"world,fineweb-edu,{tmp_path}/a.txt")
    assert json.loads(ok.stdout) == {"files": 4, "bytes": sum(len(hub.files[f"shard_{i:05d}.parquet"]) for i in (0, 1, 2, 1822))}, ok.stderr
    bad = run("fineweb-edu,wiki-zh,ultra-fineweb-zh")
    assert bad.returncode == 2 and "8 of 12 files cannot be reached" in bad.stderr and len(bad.stderr.splitlines()) == 1
    assert "20231101.zh/train-00005-of-00006.parquet: HTTP 404" in bad.stderr and "zh-part-256-of-256.parquet: HTTP 404" in bad.stderr
    assert "no known source" in run("fineweb-edu,/no/such").stderr and hub.asked == []


def test_raw_sets_are_spread_renamed_and_held_out_by_name(hub, tmp_path, monkeypatch):
    for i in range(6):
        out = pa.BufferOutputStream()
        pq.write_table(pa.table({"title": ["t"] * 30, "content": [f"第{i}片第{j}篇。" if j else "  " for j in range(30)]}), out)
        hub.files[f"train-{i:05d}-of-00006.parquet"] = out.getvalue().to_pybytes()
    cfg = settings(hub, tmp_path, source="wiki-zh", n_shards=2)
    folder = prepare(cfg)
    assert [(s["name"][6:11], s["split"], s["rows"]) for s in read_manifest(folder)["shards"]] == [("00000", "train", 29), ("00003", "train", 29), ("00005", "val", 29)]
    assert sorted(os.listdir(folder))[-2:] == ["shard_00003.parquet", "shard_00005.parquet"] and not (folder / "raw").exists()
    assert next(iter_texts(folder, "val")) == "第5片第1篇。" and set(pq.read_table(shard_paths(folder, "val")[0])["lang"].to_pylist()) == {"zh"}
    hub.asked.clear(); prepare(dataclasses.replace(cfg, n_shards=4))
    assert sorted(n[:11] for n, _, _ in hub.asked) == ["train-00001", "train-00004"]        # those before are kept
    shard_paths(folder, "train")[1].unlink()
    assert len(repair(cfg)) == 1 and verify(folder) == []
    args = [sys.executable, "-m", "nanochat_nb.data", "--source", "wiki-zh", "--n_shards", "5", "--endpoint", hub.address, "--base_dir", str(tmp_path / "two")]
    runs = [subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    assert [r.wait(60) for r in runs] == [0, 0] and verify(tmp_path / "two/base_data/wiki-zh") == []


def test_where_from_is_one_switch_hub_modelscope_or_folder(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MODELSCOPE", hub.address)
    made = [prepare(settings(hub, tmp_path / "ms", endpoint="modelscope", n_shards=1))]
    copied = tmp_path / "usb/datasets/karpathy/fineweb-edu-100b-shuffle"
    copied.mkdir(parents=True)
    for i in (0, 1822): (copied / f"shard_{i:05d}.parquet").write_bytes(hub.files[f"shard_{i:05d}.parquet"])
    made.append(prepare(settings(hub, tmp_path / "usb2", endpoint=str(tmp_path / "usb"), n_shards=1)))
    assert read_manifest(made[0])["shards"] == read_manifest(made[1])["shards"] and hub.asked
    says("shard_00001.parquet is not there; copy it", prepare, settings(hub, tmp_path / "usb2", endpoint=str(tmp_path / "usb"), n_shards=2))


def test_not_parquet_on_the_hub(hub, tmp_path):
    hub.files["shard_00001.parquet"] = b"<html>please log in</html>"
    says("shard_00001.parquet is damaged", prepare, settings(hub, tmp_path))


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_download_goes_on_where_it_was(hub, tmp_path, sig):
    hub.slow = 0.2
    for i in range(3):
        big = [{"text": f"{random.Random(1000 * i + j).randbytes(2000).hex()}"} for j in range(20)]
        write_shards(big, tmp_path / "big", source="x")
        hub.files[f"shard_{i:05d}.parquet"] = shard_paths(tmp_path / "big", "train")[0].read_bytes()
    args = [sys.executable, "-m", "nanochat_nb.data", "--source", "fineweb-edu", "--n_shards", "3", "--endpoint", hub.address, "--base_dir", str(tmp_path)]
    run = subprocess.Popen(args, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "base_data/fineweb-edu"
    for _ in range(900):
        time.sleep(0.05)
        begun = (folder / "manifest.json").exists()                       # the shard held out is whole
        if begun and len([p for p in folder.glob("*.part") if p.stat().st_size > 4000]) == 3: break
    run.send_signal(sig)
    assert run.wait(20) == (130 if sig == signal.SIGINT else -9)
    if sig == signal.SIGINT: assert "interrupted" in run.stderr.read() and verify(folder) == []
    had = {p.name[:-5]: p.stat().st_size for p in folder.glob("*.part")}
    assert len(had) == 3
    hub.slow, hub.asked = 0, []
    assert subprocess.run(args, cwd=ROOT, capture_output=True).returncode == 0
    assert {n: s for n, s, _ in hub.asked if n in had} == had and verify(folder) == []
