"Cleaning: properties that must hold for any text, planted near-duplicates, order, the command."
import json, random, re, subprocess, sys, time
from collections import Counter
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings as hyp, strategies as st
from nanochat_nb import clean as C, data, pipeline
from nanochat_nb.settings import NanochatError

ANY = st.text(st.characters(codec="utf-8"), max_size=200) | st.text("a é\u0301\u200b\xa0\u3000\r\n\t！哈３Ｄ\x1c\u2028ﬁ", max_size=60)

@hyp(max_examples=300, deadline=None)
@given(ANY)
def test_normalise_is_idempotent(t):
    once = C.normalise(t)
    assert C.normalise(once) == once
    assert "\r" not in once and "\n\n\n" not in once and not re.search(r"[ \t]\n", once)

@hyp(max_examples=200, deadline=None)
@given(st.text("abcxyz 0123456789{}[]()<>=+-*/^_\\|&%$#;:'\"\n的是不≠≤∑√αβ²", max_size=200))
def test_code_and_maths_keep_every_sign(t):
    kept = C.normalise(t)
    assert Counter(kept.replace("\n", "").replace(" ", "")) == Counter(t.replace("\n", "").replace(" ", ""))

@hyp(max_examples=300, deadline=None)
@given(st.text("天ab .,\n", max_size=8), st.integers(3, 9), st.integers(0, 10**9 - 1), st.sampled_from(["", "+86 ", "86-"]),
       st.sampled_from(["", "-", " "]), st.text("天 .,，。\n", max_size=8))
def test_no_mobile_number_is_left(before, second, rest, country, sep, after):
    if re.search(r"[a-z]$", before) or re.search("[.]$", before): before += " "
    r = f"1{second}{rest:09d}"
    masked = C.mask_private(f"{before}{country}{sep.join((r[:3], r[3:7], r[7:]))}{after}")
    assert "[PHONE]" in masked and not re.search(r"1[3-9]\d{9}", re.sub(r"[- ]", "", masked))

@hyp(max_examples=200, deadline=None)
@given(st.integers(110000, 659999), st.dates(), st.integers(0, 999))
def test_identity_numbers_go_and_wrong_ones_stay(area, day, serial):
    day = day.replace(year=1900 + day.year % 125) if not (day.month == 2 and day.day == 29) else day.replace(year=2000)
    head = f"{area}{day:%Y%m%d}{serial:03d}"
    marks = {c for c in "0123456789X" if C.valid_id(head + c)}
    assert len(marks) == 1
    for c in "0123456789X":
        assert C.mask_private(f"证件{head + c}。") == ("证件[ID]。" if c in marks else f"证件{head + c}。")

@hyp(max_examples=200, deadline=None)
@given(st.from_regex(r"[a-z0-9][a-z0-9._+-]{0,12}@[a-z0-9]{1,8}\.(cn|com|io|org\.uk)", fullmatch=True), st.sampled_from(["邮箱", "mail: ", "<"]))
def test_no_mail_address_is_left(mail, before):
    if re.search(r"^(git|hg|svn)@|[@.](example|test|invalid|localhost)\.", mail): return
    assert "@" not in C.mask_private(before + mail + "。")

def test_what_is_meant_as_utf8_comes_back():
    for t in ("清洗之前先看一看，再动手。", "naïve café — “déjà vu”", "Ünïcödé"):
        for table in ("latin-1", "cp1252"):
            try: hurt = t.encode().decode(table)
            except UnicodeDecodeError: continue
            assert C.mend(hurt) == t

@hyp(max_examples=100, deadline=None)
@given(st.lists(ANY, min_size=1, max_size=8))
def test_the_quick_path_equals_the_slow_one(texts):
    new, f = C.rewrite(texts, C.CleanSettings(), Counter())
    slow = [C.mask_private(C.drop_boilerplate(C.normalise(C.mend(t)))) for t in texts]
    def ink(t): return re.sub(r"\s", "", C.normalise(t))         # a control character inside a line end may cost a blank line
    assert list(map(ink, new)) == list(map(ink, slow))
    for k, v in C.measure(new, 120).items(): np.testing.assert_array_equal(f[k], v)

@pytest.mark.parametrize("c", "㐀一鿿，。、；：！？…～!?~")
def test_every_run_that_is_cut_is_seen(c):
    assert C.rewrite([f"before {c * 6} after"], C.CleanSettings(), Counter())[0] == [f"before {c * 3} after"]

def test_lone_surrogates_do_not_stop_it():
    new, _ = C.rewrite(["a\ud800b" * 10, "fine"], C.CleanSettings(), Counter())
    assert new == ["a\ufffdb" * 10, "fine"]


# ---- duplicates -----------------------------------------------------------------------------------------------------

WORDS = "time river stone house market winter letter garden window bridge paper teacher doctor music silver".split()

def story(rng, n=120): return " ".join(rng.choice(WORDS) + str(rng.randrange(90)) for _ in range(n))

def edited(t, share, rng):
    w = t.split()
    for i in rng.sample(range(len(w)), max(1, int(share * len(w)))): w[i] = "other" + str(rng.randrange(10**6))
    return " ".join(w)

def planted(n=150, seed=0):
    rng = random.Random(seed)
    originals = [story(rng) for _ in range(2 * n)]
    return originals, [edited(t, 0.02, rng) for t in originals[:n]]

def test_planted_near_duplicates_are_found_and_nothing_else():
    originals, copies = planted()
    label = C.near_duplicates(C.measure(originals + copies, 120)["sig"])
    n, found = len(copies), [label[len(originals) + i] == i for i in range(len(copies))]
    assert np.mean(found) >= 0.98                                                  # recall
    assert (label[:len(originals)] == np.arange(len(originals))).all()             # precision: no two originals are joined
    assert all(l == i or l >= len(originals) for i, l in zip(range(n), label[len(originals):]))

def test_of_texts_that_are_alike_the_longest_stays(tmp_path):
    rng = random.Random(3)
    texts = [story(rng) for _ in range(30)]
    longer = [t + " and one line more of it" for t in texts]
    both = [{"text": t} for pair in zip(texts, longer) for t in pair]
    for i, docs in enumerate((both, both[::-1])):
        C.clean(docs, C.CleanSettings(source="x"), tmp_path/str(i))
        assert sorted(t for s in ("train", "val") for t in data.iter_texts(tmp_path/str(i), s)) == sorted(longer)

def test_the_estimate_is_unbiased():
    rng = random.Random(1)
    a = [story(rng) for _ in range(200)]
    b = [edited(t, 0.1, rng) for t in a]
    def pieces(t): return set(C._shingles(*C._codes([t])).tolist())
    exact = np.array([len(pieces(x) & pieces(y)) / len(pieces(x) | pieces(y)) for x, y in zip(a, b)])
    guess = (C.measure(a, 120)["sig"] == C.measure(b, 120)["sig"]).mean(1)
    assert abs((guess - exact).mean()) < 0.01 and np.abs(guess - exact).mean() < 0.06

def test_the_outcome_does_not_depend_on_the_order(tmp_path):
    originals, copies = planted(60)
    docs = [{"text": t} for t in originals + copies + originals[:20]]
    reports, kept = [], []
    for i in range(3):
        reports.append(C.clean(random.Random(i).sample(docs, len(docs)), C.CleanSettings(source="x"), tmp_path/str(i)))
        kept.append(sorted(t for s in ("train", "val") for t in data.iter_texts(tmp_path/str(i), s)))
    assert reports[0] == reports[1] == reports[2] and kept[0] == kept[1] == kept[2]
    assert reports[0]["dropped"]["exact duplicate"] == 20 and reports[0]["dropped"]["near duplicate"] >= 58

def test_batches_do_not_matter(monkeypatch, tmp_path):
    originals, copies = planted(40)
    dirt = ["a line that stays as it is, for the length of it\nCall 13800138000 today.\nall rights reserved",
            "another line that stays, for the length of it\n\n\n\na@b.org wrote it all on a\xa0Monday"]
    docs = [{"text": t} for t in originals + copies + dirt]
    C.clean(docs, C.CleanSettings(source="x"), tmp_path/"a")
    batches = C._batches
    monkeypatch.setattr(C, "_batches", lambda rows: batches(rows, 1))
    C.clean(docs[::-1], C.CleanSettings(source="x"), tmp_path/"b")
    assert (tmp_path/"a/clean.json").read_bytes() == (tmp_path/"b/clean.json").read_bytes()


# ---- the command ----------------------------------------------------------------------------------------------------

def run(*args):
    done = subprocess.run([sys.executable, "-m", "nanochat_nb.clean", *map(str, args)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

def test_command_cleans_a_folder(tmp_path):
    originals, copies = planted(30)
    rows = [{"text": t} for t in originals + copies + ["short"]]
    (tmp_path/"in").mkdir()
    (tmp_path/"in/a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, out, err = run("--source", tmp_path/"in", "--out", tmp_path/"out")
    said = json.loads(out.splitlines()[-1])
    assert code == 0 and said["documents"] == 91 and said["dropped"]["too short"] == 1, err
    assert data.read_manifest(tmp_path/"out")["recipe"]["clean"]["near"] == 0.7 and data.verify(tmp_path/"out") == []
    assert json.loads((tmp_path/"out/clean.json").read_text(encoding="utf-8"))["kept"] == said["kept"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]             # no spool is left

@pytest.mark.parametrize("flags, said", [(["--near", "1.5"], "near=1.5"), (["--bands", "0"], "bands=0"), (["--chars_per_shard", "0"], "chars_per_shard=0"), (["--min_byte", "3"], "min_bytes"),
                                         (["--min_bytes", "100000"], "too short")])
def test_bad_settings_are_named(tmp_path, flags, said):
    (tmp_path/"a.txt").write_text("some text that is long enough to be kept by every rule of the chapter, surely so")
    code, out, err = run("--source", tmp_path/"a.txt", "--out", tmp_path/"out", *flags)
    assert code == 2 and said in err and not (tmp_path/"out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]

def test_a_row_without_text_is_named(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path/"a.parquet")
    with pytest.raises(NanochatError, match="row 2"): C.clean(tmp_path/"a.parquet", C.CleanSettings(), tmp_path/"out")

def test_a_folder_that_holds_anything_else_is_never_replaced(tmp_path):
    originals, _ = planted(20)
    (tmp_path/"in").mkdir(); (tmp_path/"in/a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in originals))
    (tmp_path/"mine").mkdir(); (tmp_path/"mine/thesis.odt").write_text("dear"); (tmp_path/"mine/manifest.json").write_text("{}")
    for out, said in (("in", "is itself a source"), ("mine", "holds thesis.odt"), ("in/a.jsonl", "holds a.jsonl")):
        code, _, err = run("--source", tmp_path/"in", "--out", tmp_path/out)
        assert code == 2 and said in err
        with pytest.raises(NanochatError, match=said):
            pipeline.clean_many(pipeline.PipelineSettings(source=str(tmp_path/"in"), workers=1), tmp_path/out)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "in", "in/a.jsonl", "mine", "mine/manifest.json", "mine/thesis.odt"]
    for _ in range(2): assert run("--source", tmp_path/"in", "--out", tmp_path/"out")[0] == 0        # older shards are

def test_the_text_is_never_all_in_memory(tmp_path):
    "Six times the text costs little more memory: piles and hands, whose size is bounded."
    code = """import random, resource, sys
from nanochat_nb import clean as C
def docs(n):
    rng = random.Random(n)
    for _ in range(n): yield {"text": rng.randbytes(15_000).hex("\\n", 30)}
def peak(n):
    C.clean(docs(n), C.CleanSettings(source="x", min_quality=0, near=0), sys.argv[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
small = peak(1500)
print(peak(9000) - small)"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path/"out")], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) < 350, (done.stdout, done.stderr)

def test_held_out_as_in_the_data_chapter(tmp_path):
    docs = [{"text": t} for t in planted(60)[0]] + [{"text": f"今天走了{i}里路，在河边看了花，又去镇上吃了一碗面，天黑才回来。" * 2} for i in range(90)]
    C.clean(docs, C.CleanSettings(source="x", near=0, seed=7), tmp_path/"out")
    got = {s: set(data.iter_texts(tmp_path/"out", s)) for s in ("train", "val")}
    kept = [{"text": t, "lang": data.lang_of(t)} for t in sorted(got["train"] | got["val"])]
    held = data.choose_val(kept, 7)
    assert len(kept) == 210 and {d["text"] for d, x in zip(kept, held) if x} == got["val"]

def test_a_long_run_beside_an_at_sign_takes_no_time():
    start = time.time()
    assert C.mask_private("f" * 100_000 + " @ _li.lei@mail.cn") == "f" * 100_000 + " @ _[EMAIL]"
    assert time.time() - start < 1

def test_texts_too_short_for_a_shingle_are_no_copies(tmp_path):
    docs = [{"text": f"第{i}行"} for i in range(30)]
    assert C.clean(docs, C.CleanSettings(source="x", min_bytes=0, min_quality=0), tmp_path/"out")["kept"] == 30

def test_text_mended_is_of_the_language_it_then_shows(tmp_path):
    texts = [f"今天走了{i}里路，在河边看了花，又去镇上吃了一碗面，天黑才回来。" for i in range(20)]
    (tmp_path/"a.jsonl").write_text("\n".join(json.dumps({"text": t.encode().decode("latin-1")}) for t in texts))
    C.clean(tmp_path/"a.jsonl", C.CleanSettings(source="x", near=0), tmp_path/"out")
    assert sorted(t for s in ("train", "val") for t in data.iter_texts(tmp_path/"out", s, "zh")) == sorted(texts)

def test_text_may_stand_under_content_and_must_be_utf8(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    pq.write_table(pa.table({"content": planted(10)[0]}), tmp_path/"a.parquet")
    assert C.clean(tmp_path/"a.parquet", C.CleanSettings(source="x"), tmp_path/"out")["kept"] == 20
    pq.write_table(pa.table({"text": pa.array([b"\xff\xfe" * 50], pa.binary()).view(pa.string())}), tmp_path/"b.parquet")
    with pytest.raises(NanochatError, match="b.parquet is damaged.*UTF8"): C.clean(tmp_path/"b.parquet", C.CleanSettings(), tmp_path/"o")

def test_folders_of_one_name_are_cleaned_into_two(tmp_path, monkeypatch, capsys):
    originals, _ = planted(60)
    for year, some in (("2023", originals[:25]), ("2024", originals[25:])):
        (tmp_path/year/"zh").mkdir(parents=True)
        (tmp_path/year/"zh/a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in some))
    made = []
    def go(main, cls, source):
        monkeypatch.chdir(tmp_path/"2023")
        main(cls(source=source, base_dir=str(tmp_path/"base")))
        made.append(json.loads(capsys.readouterr().out.splitlines()[-1])["folder"])
    both = [(C.main, C.CleanSettings), (pipeline.main, pipeline.PipelineSettings)]
    for main, cls in both:
        for source in (tmp_path/"2023/zh", "zh", "zh/", tmp_path/"2024/zh"): go(main, cls, str(source))
    assert len(set(made)) == 2 and made[0] == made[1] == made[2] != made[3] and made[:4] == made[4:]      # its own is replaced
    assert all(Path(m).name.startswith("zh-") and m.endswith("-clean") and Path(m).parent == tmp_path/"base/base_data" for m in made)
    assert [sum(s["rows"] for s in data.read_manifest(m)["shards"]) for m in made[2:4]] == [25, len(originals) - 25]
    data.write_shards([{"text": t} for t in originals], tmp_path/"2023/shards", source="x")               # shards have no name of their own
    data.write_shards([{"text": t} for t in originals], tmp_path/"2024/shards", source="x")
    assert len({C.out_folder(C.CleanSettings(source=str(tmp_path/y/"shards"))) for y in ("2023", "2024")}) == 2
    assert C.out_folder(C.CleanSettings(base_dir=str(tmp_path))) == tmp_path/"base_data/world-clean"
