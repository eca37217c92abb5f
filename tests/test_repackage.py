"Repackage: any text comes back whole, the same bytes every time, splits that never move, shares as asked for."
import csv, dataclasses, json, os, subprocess, sys, tempfile, types
from collections import Counter
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings as settings_, strategies as st
from nanochat_nb import data, world
from nanochat_nb.data import *
from nanochat_nb.repackage import *
from nanochat_nb.settings import NanochatError

ROOT = Path(__file__).parent.parent
CORPUS = ROOT.parent / "shared/corpus"
DOCS = world.corpus(world.World(seed=0, n_people=30), n_chars=300_000, seed=0)
BY_LANG = {l: [d["text"] for d in DOCS if d["lang"] == l] for l in ("zh", "en")}


def says(text, f, *args, **kw):
    with pytest.raises(NanochatError) as e: f(*args, **kw)
    assert text in str(e.value), str(e.value)


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"content": pa.array(texts, pa.string())}), path, row_group_size=100)
    return path


def settings(tmp, source, /, **kw): return RepackageSettings(**{"source": str(source), "out": str(tmp / "out"), "val_fraction": 0.05, "chars_per_shard": 50_000} | kw)
def texts_of(folder): return {s: [t for p in shard_paths(folder, s) for t in pq.read_table(p)["text"].to_pylist()] for s in ("train", "val")}
def read(folder): return {(r["name"].split("/")[-1], r["lang"]): r for r in read_manifest(folder)["recipe"]["read"]}


# ---- what goes in comes out

@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=30), st.integers(40, 400), st.integers(0, 9))
@settings_(derandomize=True, max_examples=25, deadline=None)
def test_any_unicode_comes_back(texts, size, seed):
    texts += [f"篇{i}" for i in range(60)]                          # enough for both splits
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        write(tmp / "in/a.parquet", texts[::2])
        (tmp / "in/b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts[1::2]))
        folder = repackage(settings(tmp, tmp / "in", chars_per_shard=size, seed=seed, val_fraction=0.3))
        got = texts_of(folder)
        assert Counter(got["train"] + got["val"]) == Counter(t for t in texts if t.strip())
        assert verify(folder) == [] and {s: list(iter_texts(folder, s)) for s in got} == got
        assert all(s["characters"] >= size for s in read_manifest(folder)["shards"][:-1] if s["split"] == "train" and s["name"] != shard_paths(folder, "train")[-1].name)


def test_every_kind_of_file_in_one_folder(tmp_path):
    d = tmp_path / "in"
    write(d / "sub/a.parquet", BY_LANG["zh"][:200])
    (d / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in BY_LANG["en"][:200]))
    (d / "c.txt").write_text("\n".join(f"第{i}行" for i in range(9000)), encoding="utf-8")
    with open(d / "d.csv", "w", newline="", encoding="utf-8") as f: csv.writer(f).writerows([["text"], *[[t] for t in BY_LANG["en"][200:300]]])
    folder = repackage(settings(tmp_path, d, chars_per_shard=20_000))
    want = Counter(x["text"] for p in source_files(str(d)) for x in read_documents(p))
    got = texts_of(folder)
    assert Counter(got["train"] + got["val"]) == want and len(want) > 480 and len(shard_paths(folder, "train")) > 3
    for p in shard_paths(folder, "train"):
        md = pq.ParquetFile(p).metadata
        assert all(md.row_group(g).num_rows == 1024 for g in range(md.num_row_groups - 1)) and md.row_group(0).column(0).compression == "ZSTD"
    assert prepare(DataSettings(source=str(folder))) == folder                        # training takes it as it is


def test_row_groups_are_of_1024_and_shards_end_where_they_are_full(tmp_path):
    folder = repackage(settings(tmp_path, write(tmp_path / "a.parquet", [f"{i:05d}" for i in range(6000)]), chars_per_shard=12_500))
    shards = [s for s in read_manifest(folder)["shards"] if s["split"] == "train"]
    assert [s["rows"] for s in shards[:-1]] == [2500] * (len(shards) - 1) and len(shards) == 3
    md = pq.ParquetFile(folder / shards[0]["name"]).metadata
    assert [md.row_group(g).num_rows for g in range(md.num_row_groups)] == [1024, 1024, 452]


def test_the_same_input_and_seed_give_the_same_bytes(tmp_path):
    write(tmp_path / "a.parquet", BY_LANG["zh"]); write(tmp_path / "b.parquet", BY_LANG["en"])
    cfg = settings(tmp_path, f"{tmp_path}/a.parquet:0.3,{tmp_path}/b.parquet:0.7")
    first = read_manifest(repackage(cfg))
    run = subprocess.run([sys.executable, "-m", "nanochat_nb.repackage", *[f"--{k}={getattr(cfg, k)}" for k in ("source", "val_fraction", "chars_per_shard")],
                          f"--out={tmp_path}/other"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and read_manifest(tmp_path / "other") == first, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["rows"] == sum(s["rows"] for s in first["shards"])
    assert read_manifest(repackage(dataclasses.replace(cfg, seed=1)))["shards"] != first["shards"]


def test_another_seed_is_another_order(tmp_path):
    from nanochat_nb.repackage import _gather
    def shuffled(seed):
        with pa.ipc.new_stream(str(tmp_path / "0.arrow"), pa.schema([("text", pa.string())])) as out: out.write_table(pa.table({"text": [str(i) for i in range(300)]}))
        return [t for table in _gather([tmp_path / "0.arrow"], seed) for t in table["text"].to_pylist()]
    assert shuffled(1) == shuffled(1) != shuffled(2) and sorted(shuffled(2), key=int) == [str(i) for i in range(300)]

def test_every_licence_is_carried_on(tmp_path):
    for name in "ab":
        write_shards(DOCS[:200], tmp_path / name, source=name)
        page = tmp_path / name / "manifest.json"
        page.write_text(json.dumps(json.loads(page.read_text(encoding="utf-8")) | dict(licence=f"licence {name}")), encoding="utf-8")
    assert read_manifest(repackage(settings(tmp_path, f"{tmp_path}/a,{tmp_path}/b")))["licence"] == "licence a; licence b"

def test_many_piles_shuffle_as_well_as_one(tmp_path):
    path = write(tmp_path / "a.parquet", [f"{i:06d} " + "x" * 600 for i in range(6000)])           # 3.6 MB: four piles of 1 MB
    for mb in (1, 128):
        got = [int(t[:6]) for t in texts_of(repackage(settings(tmp_path, path, pile_mb=mb, chars_per_shard=10**9)))["train"]]
        apart = np.abs(np.diff(got)).mean() / 6000                                                  # a third, if neighbours are strangers
        assert abs(apart - 1 / 3) < 0.02 and abs(np.corrcoef(got, range(len(got)))[0, 1]) < 0.05


# ---- splits

@given(st.sets(st.text("abc好的", min_size=1, max_size=5), min_size=30, max_size=60), st.integers(1, 29))
@settings_(derandomize=True, max_examples=20, deadline=None)
def test_splits_are_disjoint_and_no_document_ever_changes_sides(texts, n):
    texts = sorted(texts)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        write(tmp / "in/a.parquet", texts[:n] * 2 + [f"{i}" for i in range(40)])
        before = texts_of(repackage(settings(tmp, tmp / "in", val_fraction=0.2)))
        write(tmp / "in/b.parquet", texts[n:] + texts[:3])
        after = texts_of(repackage(settings(tmp, tmp / "in", val_fraction=0.2, chars_per_shard=50, pile_mb=1)))
        assert not set(after["train"]) & set(after["val"])
        assert set(before["train"]) <= set(after["train"]) and set(before["val"]) <= set(after["val"])


def test_what_a_source_holds_out_stays_held_out(tmp_path):
    m = write_shards(DOCS, tmp_path / "made", source="x")
    folder = repackage(settings(tmp_path, tmp_path / "made", val_fraction=0.001))
    assert set(iter_texts(tmp_path / "made", "val")) <= set(iter_texts(folder, "val")) and m["shards"][-1]["split"] == "val"
    assert sum(s["rows"] for s in read_manifest(folder)["shards"]) == len(DOCS)


# ---- mixtures

def mixed(tmp_path, a, b, **kw):
    write(tmp_path / "en.parquet", BY_LANG["en"]); write(tmp_path / "zh.parquet", BY_LANG["zh"])
    return repackage(settings(tmp_path, f"{tmp_path}/en.parquet{a},{tmp_path}/zh.parquet{b}", **kw))


@pytest.mark.parametrize("stop", ["last", "first"])
@pytest.mark.parametrize("en", [0.2, 0.5, 0.9])
def test_weights_are_shares_of_characters(tmp_path, en, stop):
    folder = mixed(tmp_path, f":{en}", f":{1 - en:.1f}", stop=stop)
    r, size = read(folder), {l: sum(map(len, BY_LANG[l])) for l in BY_LANG}
    got = {l: r[f"{l}.parquet", ""] for l in size}
    total = sum(x["got"] for x in got.values())
    assert abs(got["en"]["got"] - en * total) < 0.03 * total
    assert sum(s["characters"] for s in read_manifest(folder)["shards"]) == total
    whole = max(got, key=lambda l: size[l] / {"en": en, "zh": 1 - en}[l]) if stop == "last" else min(got, key=lambda l: size[l] / {"en": en, "zh": 1 - en}[l])
    assert got[whole]["got"] == size[whole] and got[whole]["rounds"] == 1
    if stop == "first": assert all(x["got"] <= size[l] for l, x in got.items())                     # nothing repeated
    seen = Counter(t for ts in texts_of(folder).values() for t in ts)
    for l, x in got.items(): assert all(seen[t] <= n * (x["rounds"] + 1) for t, n in Counter(BY_LANG[l]).items())


def test_counts_are_documents_and_the_smaller_source_cycles(tmp_path):
    folder = mixed(tmp_path, "@150", f"@{2 * len(BY_LANG['zh']) + 7}")
    r = read(folder)
    assert r["en.parquet", ""]["rows"] == 150 and r["zh.parquet", ""]["rows"] == 2 * len(BY_LANG["zh"]) + 7
    got = Counter(t for ts in texts_of(folder).values() for t in ts)
    times = Counter(BY_LANG["zh"])
    assert all(2 * times[t] <= got[t] <= 3 * times[t] for t in times) and sum(got[t] for t in set(BY_LANG["en"])) == 150


@pytest.mark.parametrize("zh", [0.0, 0.25, 1.0])
def test_the_dial_of_languages(tmp_path, zh):
    write(tmp_path / "both.parquet", [d["text"] for d in DOCS]); write(tmp_path / "zh.parquet", BY_LANG["zh"])
    for source in (f"{tmp_path}/both.parquet", f"{tmp_path}/both.parquet:0.5,{tmp_path}/zh.parquet:0.5"):
        folder = repackage(settings(tmp_path, source, zh=zh))
        chars = Counter()
        for p in (*shard_paths(folder, "train"), *shard_paths(folder, "val")):
            for d in read_documents(p): chars[d["lang"]] += len(d["text"])
        assert abs(chars["zh"] - zh * sum(chars.values())) < 0.03 * sum(chars.values()), (chars, source)


def test_what_cannot_be_done_is_said_and_nothing_is_left(tmp_path):
    a = write(tmp_path / "a/a.parquet", [f"document number {i}" for i in range(500)])
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/diary.txt").write_text("dear")
    (tmp_path / "site").mkdir(); (tmp_path / "site/app.js").write_text(""); (tmp_path / "site/manifest.json").write_text('{"name": "app"}')   # of another kind
    (tmp_path / "e.jsonl").write_text("")
    for text, kw in (("expected both", dict(source="")), ("expected both", dict(out="")), ("did you mean 'first'", dict(stop="frist")), ("a share, 0 … 1", dict(zh=1.5)),
                     ("holds no zh text", dict(zh=0.5)), ("give the sources weights", dict(source=f"{a}@5", zh=0.5)), ("all fell to one split", dict(source=f"{a}@1")),
                     ("no known source", dict(source="/no/such")), ("the same for every source", dict(source=f"{a}:1,{a}")), ("pile_mb=0", dict(pile_mb=0)),
                     ("is itself a source", dict(out=str(tmp_path / "a"))), ("holds diary.txt, which is no shard; name a new folder", dict(out=str(tmp_path / "mine"))), ("holds app.js", dict(out=str(tmp_path / "site"))),
                     ("/e.jsonl' holds no text", dict(source=f"{a}:0.7,{tmp_path}/e.jsonl:0.3")), ("/e.jsonl' holds no text", dict(source=f"{a}@100,{tmp_path}/e.jsonl@9"))):
        says(text, repackage, settings(tmp_path, a, **kw))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    says("null.parquet row 2: 'text' is NoneType", repackage, settings(tmp_path, tmp_path / "null.parquet"))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["a", "e.jsonl", "mine", "null.parquet", "site"]
    assert a.exists() and (tmp_path / "mine/diary.txt").exists() and (tmp_path / "site/app.js").exists()


def test_the_language_that_is_missing_is_named(tmp_path):
    "Chinese text alone: whatever the order of sets, which Python salts anew at every start, it is English that is missing."
    a = write(tmp_path / "a.parquet", BY_LANG["zh"][:100])
    for salt in "0123":
        done = subprocess.run([sys.executable, "-m", "nanochat_nb.repackage", "--source", str(a), "--out", str(tmp_path / "out"), "--zh", "0.3"],
                              cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": salt}, capture_output=True, text=True)
        assert done.returncode and "holds no en text" in done.stderr, done.stderr


def test_an_error_in_the_middle_keeps_the_older_shards(tmp_path, monkeypatch):
    cfg = settings(tmp_path, write(tmp_path / "a.parquet", BY_LANG["en"]))
    m = read_manifest(repackage(cfg))
    real = pq.ParquetWriter
    def fails(path, *args, **kw):
        if "00002" in str(path): raise OSError(28, "No space left on device")
        return real(path, *args, **kw)
    monkeypatch.setattr(pq, "ParquetWriter", fails)
    says("free disk space", repackage, dataclasses.replace(cfg, seed=7))
    assert read_manifest(tmp_path / "out") == m and verify(tmp_path / "out") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "a.parquet", "out"]


def test_command_errors_are_one_line(tmp_path):
    run = subprocess.run([sys.executable, "-m", "nanochat_nb.repackage", "--source", "wrld", "--out", str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "did you mean 'world'" in run.stderr and len(run.stderr.splitlines()) == 1


def test_upload_asks_for_just_the_shards_and_refuses_damaged_ones(tmp_path, monkeypatch):
    calls = []
    class Api:
        def __init__(self, endpoint): calls.append(endpoint)
        def create_repo(self, repo_id, **kw): calls.append((repo_id, kw))
        def upload_folder(self, **kw): calls.append(kw)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Api))
    folder = repackage(settings(tmp_path, write(tmp_path / "a.parquet", BY_LANG["en"])))
    upload(folder, "me/set", "https://hub.example/")
    assert calls[0] == "https://hub.example" and calls[1] == ("me/set", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert calls[2]["folder_path"] == str(folder) and calls[2]["repo_id"] == "me/set" and calls[2]["allow_patterns"] == ["*.parquet", "manifest.json"]
    shard_paths(folder, "val")[0].unlink()
    says("missing; mend it before uploading", upload, folder, "me/set")
    assert len(calls) == 3


def test_an_upload_that_fails_is_an_error_of_one_line(tmp_path, monkeypatch):
    class Api:
        def __init__(self, endpoint): pass
        def create_repo(self, repo_id, **kw): raise ValueError("401 Unauthorized")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Api))
    folder = repackage(settings(tmp_path, write(tmp_path / "a.parquet", BY_LANG["en"]), seed=-1))        # any seed will do
    says("out was not uploaded (401 Unauthorized); mend that", upload, folder, "me/set")


@pytest.mark.skipif(not CORPUS.exists(), reason="needs the real corpus beside the checkout")
def test_real_text(tmp_path):
    folder = repackage(settings(tmp_path, CORPUS / "clean.parquet", val_fraction=0.01, chars_per_shard=4_000_000, pile_mb=4))
    got, want = texts_of(folder), pq.read_table(CORPUS / "clean.parquet")["text"].to_pylist()
    assert Counter(got["train"] + got["val"]) == Counter(t for t in want if t.strip()) and verify(folder) == []
    assert len(shard_paths(folder, "train")) >= 3 and not set(got["train"]) & set(got["val"])


# ---- a language that is there by chance

ZH = [f"第{i}篇中文，说一说今天的天气和晚饭。" for i in range(2000)]
EN = [f"English document number {i}, about the weather and what there is for dinner." for i in range(600)]
STRAY = "这一篇是混进来的。"


@pytest.mark.parametrize("stop", ["last", "first"])
@pytest.mark.parametrize("weights", [("", ""), (":0.5", ":0.5"), (":0.2", ":0.8")])
def test_a_stray_document_neither_cycles_nor_ends_the_mix(tmp_path, weights, stop):
    write(tmp_path / "my_zh.parquet", ZH); write(tmp_path / "my_en.parquet", EN[:300] + [STRAY] + EN[300:])
    cfg = settings(tmp_path, f"{tmp_path}/my_zh.parquet{weights[0]},{tmp_path}/my_en.parquet{weights[1]}", zh=0.8, stop=stop)
    folder = repackage(cfg)
    r = read(folder)
    got = [sum(x["got"] for (_, l), x in r.items() if l == lang) for lang in ("zh", "en")]
    assert abs(got[0] / sum(got) - 0.8) < 0.02 and r["my_en.parquet", "zh"]["rows"] == r["my_en.parquet", "zh"]["rounds"] == 1
    times = Counter(t for ts in texts_of(folder).values() for t in ts)
    assert times[STRAY] == 1 and max(times.values()) <= (1 if stop == "first" else 6)       # 8 parts of 36,000 characters, 2 of 45,000
    if stop == "last": assert set(times) == {*ZH, *EN, STRAY}
    else: assert r["my_zh.parquet", "zh"]["rounds"] + r["my_en.parquet", "en"]["rounds"] == 1 and sum(times.values()) > 1000
    assert read_manifest(repackage(dataclasses.replace(cfg, out=str(tmp_path / "again"))))["shards"] == read_manifest(folder)["shards"]


def test_a_rare_language_counts_where_no_source_has_more(tmp_path):
    write(tmp_path / "web.parquet", EN + ZH[:5])
    r = read(repackage(settings(tmp_path, tmp_path / "web.parquet", zh=0.02)))
    assert 1 < r["web.parquet", "zh"]["rounds"] < 20 and r["web.parquet", "en"]["rounds"] == 1
    write(tmp_path / "more.parquet", EN + ZH[5:9])
    r = read(repackage(settings(tmp_path, f"{tmp_path}/web.parquet,{tmp_path}/more.parquet", zh=0.02)))
    assert all(1 < r[n, "zh"]["rounds"] < 20 for n in ("web.parquet", "more.parquet"))


def test_a_small_source_of_large_weight_cycles(tmp_path):
    write(tmp_path / "small.parquet", ZH[:100]); write(tmp_path / "big.parquet", ZH[100:2000]); write(tmp_path / "en.parquet", EN)
    r = read(repackage(settings(tmp_path, f"{tmp_path}/small.parquet:0.5,{tmp_path}/big.parquet:0.5,{tmp_path}/en.parquet:0.1", zh=0.6)))
    assert 19 <= r["small.parquet", "zh"]["rounds"] <= 23 and abs(r["small.parquet", "zh"]["got"] / r["big.parquet", "zh"]["got"] - 1) < 0.03


def test_what_would_be_read_over_a_hundred_times_is_an_error_at_once(tmp_path, monkeypatch):
    write(tmp_path / "web.parquet", EN + [STRAY] * 2)
    from nanochat_nb import repackage as R
    reads, real = [], R.text_tables
    monkeypatch.setattr(R, "text_tables", lambda p: reads.append(p.name) or real(p))
    says("web.parquet holds 2 zh documents of 18 characters, which zh=0.8 would read over 100 times; add zh text, or leave zh out", repackage,
         settings(tmp_path, tmp_path / "web.parquet", zh=0.8))
    assert len(reads) <= 3 and [p.name for p in tmp_path.iterdir() if p.name != ".out.lock"] == ["web.parquet"]     # after one round
    write(tmp_path / "few.parquet", EN[:10] + [STRAY]); write(tmp_path / "zh.parquet", ZH)                         # a tenth: not by chance
    says("few.parquet holds 1 zh documents of 9 characters", repackage, settings(tmp_path, f"{tmp_path}/few.parquet,{tmp_path}/zh.parquet", zh=0.8))
    write(tmp_path / "one.parquet", ZH[:10])                                                                       # without zh: as the weights say
    assert read(repackage(settings(tmp_path, f"{tmp_path}/one.parquet:0.5,{tmp_path}/zh.parquet:0.5")))["one.parquet", ""]["rounds"] > 100


def test_the_source_that_ended_the_mix_is_named(tmp_path):
    write(tmp_path / "few.parquet", EN[:10] + [STRAY]); write(tmp_path / "zh.parquet", ZH)
    says("stop=first ended after 1 zh documents of ", repackage, settings(tmp_path, f"{tmp_path}/zh.parquet,{tmp_path}/few.parquet", zh=0.8, stop="first", val_fraction=0.001))
    says("few.parquet; take stop=last, or add text", repackage, settings(tmp_path, f"{tmp_path}/zh.parquet,{tmp_path}/few.parquet", zh=0.8, stop="first", val_fraction=0.001))
