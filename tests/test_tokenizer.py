"The tokenizer against transformers, on any Unicode text, on bad conversations and files, and as a command."
import ast, dataclasses, inspect, itertools, json, re, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from nanochat_nb.settings import NanochatError, field_comments
from nanochat_nb.tokenizer import (SPECIAL, StreamDecoder, Tokenizer, TokenizerSettings, check_text, prepare_tokenizer,
                                   sample_texts, train_tokenizer)
from nanochat_nb.world import World, corpus

TEXTS = [d["text"] for d in corpus(World(seed=0), n_chars=60_000)]
TOK = train_tokenizer(TEXTS, 700)
NOTEBOOK = Path(__file__).parents[1]/"nbs"/"01_tokenizer.ipynb"
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
a_char = st.characters(exclude_categories=("Cs",)) | st.sampled_from("你好 a1\n。<|>")
any_text = st.lists(st.text(a_char) | st.sampled_from(SPECIAL)).map("".join)

@settings(max_examples=200, deadline=None)
@given(any_text)
def test_any_text_comes_back(text):
    ids = TOK.encode(text)
    assert TOK.decode(ids) == text and TOK.encode_batch([text]) == [ids]
    assert not TOK.special_ids & set(ids)
    assert sum(TOK.token_bytes()[i] for i in ids) == len(text.encode())

@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOK.vocab_size - 1)))
def test_a_stream_is_the_whole(ids):
    s = StreamDecoder(TOK)
    pieces = [s.push(i) for i in ids]
    assert "".join(pieces) + s.flush() == TOK.decode(ids)
    assert TOK.decode(ids) == TOK._tk.decode(ids, skip_special_tokens=False)

@settings(max_examples=100, deadline=None)
@given(any_text, any_text)
def test_text_cannot_pose_as_a_mark(a, b):
    ids, mask = TOK.render({"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]})
    assert [i for i in ids if i in TOK.special_ids] == [TOK.special(n) for n in ("bos", "user_start", "user_end", "assistant_start", "assistant_end")]
    assert sum(mask) == len(TOK.encode(b)) + 1

def test_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOK.save(tmp_path)
    hf = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path/"tokenizer.json"), split_special_tokens=True)
    assert len(hf) == TOK.vocab_size
    for text in TEXTS[:50] + ["<|bos|> 你好 🦊 1234\r\n\n  x"]:
        assert hf.encode(text, add_special_tokens=False) == TOK.encode(text)
        assert hf.decode(TOK.encode(text), clean_up_tokenization_spaces=False) == text
    assert hf.convert_tokens_to_ids(list(SPECIAL)) == [TOK.special(s) for s in SPECIAL]

def test_chinese_clauses_are_not_one_piece():
    pieces = [p for p, _ in TOK._tk.pre_tokenizer.pre_tokenize_str("她在南京东路等了三个钟头花了1250元。")]
    assert max(len(p) for p in pieces) <= 12  # four characters of three bytes
    assert pieces.count("1") == pieces.count("2") == pieces.count("5") == pieces.count("0") == 1

TOOL, SYSTEM = [{"type": "python", "text": "1"}], {"role": "system", "content": "x"}
@pytest.mark.parametrize("messages, say", [
    ([BOT], "message 0"), ([USER, USER], "message 1"), ([USER, BOT, BOT], "message 2"), ([USER, SYSTEM], "message 1"),
    ([SYSTEM], "message 0"), ([SYSTEM, SYSTEM], "message 1"), ([], "list of messages"), (None, "list of messages"), (["hi"], "message 0"),
    ([USER, {"role": "tool", "content": "x"}], "'tool'"), ([USER, {"content": "x"}], "role None"),
    ([{"role": "user", "content": TOOL}], "text parts only"), ([USER, {"role": "assistant", "content": None}], "message 1: content"),
    ([USER, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "message 1, part 0"),
    ([{"role": "user", "content": "\ud800"}], "message 0: lone surrogate")])
def test_bad_conversations(messages, say):
    with pytest.raises(NanochatError, match=re.escape(say)): TOK.render({"messages": messages})

def test_other_bad_input():
    for call, say in [(lambda: TOK.render([USER, BOT]), "'messages'"), (lambda: TOK.render_prompt([USER, BOT]), "message 1"),
                      (lambda: TOK.render_prompt([]), "list of messages"), (lambda: check_text("broken \ud83d"), "character 7"),
                      (lambda: train_tokenizer(["ok", "\ud800"], 300), "training text 1"), (lambda: train_tokenizer(["ok"], 264), "265"),
                      (lambda: train_tokenizer(["ok"], 10**9), "vocab_size=1000000000: expected 265 .* to 1048576")]:
        with pytest.raises(NanochatError, match=say): call()

@pytest.mark.parametrize("pattern", [r"\S+|\s", r"\s?\S+", ".+", r"[\w<|>]+"])
def test_a_pattern_under_which_text_could_become_a_mark_is_refused(pattern):
    texts = itertools.chain(["say <|bos|> <|user_end|>"] * 9, (pytest.fail("read to the end") for _ in [0]))
    with pytest.raises(NanochatError, match=r"leaves <\|bos\|> uncut, so text could become it"): train_tokenizer(texts, 400, pattern)

def test_parts_of_a_user_message_are_joined():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert TOK.render({"messages": [{"role": "user", "content": parts}, BOT]}) == TOK.render({"messages": [USER, BOT]})

def test_damaged_files(tmp_path):
    with pytest.raises(NanochatError, match="does not exist"): Tokenizer.load(tmp_path)
    whole = (TOK.save(tmp_path)/"tokenizer.json").read_bytes()
    for broken in (whole[:-100], whole.replace(b'"Split"', b'"Splat"'), b"\xff" + whole[1:], b""):
        (tmp_path/"tokenizer.json").write_bytes(broken)
        with pytest.raises(NanochatError, match="tokenizer.json is not the file"): Tokenizer.load(tmp_path)
    TOK.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == TOK.hash
    for other in ("[]", "null", "{}"):
        (tmp_path/"meta.json").write_text(other)
        with pytest.raises(NanochatError, match="is not the file that meta.json describes"): Tokenizer.load(tmp_path)
    (tmp_path/"meta.json").write_text("{")
    with pytest.raises(NanochatError, match="meta.json"): Tokenizer.load(tmp_path)
    (tmp_path/"meta.json").unlink()
    with pytest.raises(NanochatError, match="meta.json does not exist"): Tokenizer.load(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merges.txt", "token_bytes.json", "tokenizer.json"]

def test_sample_texts():
    count = {}
    assert list(sample_texts(["abcdef", "", "gh", "ijkl"], 8, 5, count)) == ["abcde", "", "gh", "i"]
    assert count == {"characters": 8, "documents": 4}

@pytest.fixture
def own(tmp_path):
    (tmp_path/"own").mkdir()
    (tmp_path/"own"/"a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    return TokenizerSettings(source=str(tmp_path/"own"), base_dir=str(tmp_path), vocab_size=600)

def test_prepare_finds_or_makes(own, capsys):
    first, meta = prepare_tokenizer(own), Path(own.base_dir)/"tokenizer"/"meta.json"
    stamp = meta.stat().st_mtime_ns
    assert first.vocab_size == 600 and set(first.meta["bytes_per_token"]) == {"zh", "en"}
    assert prepare_tokenizer(own).hash == first.hash and meta.stat().st_mtime_ns == stamp   # found
    assert prepare_tokenizer(dataclasses.replace(own, vocab_size=500)).vocab_size == 500    # another recipe
    kept = meta.parent.with_name(f"tokenizer-{first.hash[:12]}")
    assert Tokenizer.load(kept).hash == first.hash and str(kept) in capsys.readouterr().err # checkpoints may need it
    assert prepare_tokenizer(own).hash == first.hash                                        # and the same again
    (meta.parent/"tokenizer.json").write_text("cut in half")
    assert prepare_tokenizer(own).hash == first.hash and "making the tokenizer again" in capsys.readouterr().err
    with pytest.raises(NanochatError, match="doc_cap=0"): prepare_tokenizer(dataclasses.replace(own, doc_cap=0))

def test_command(own):
    run = [sys.executable, "-m", "nanochat_nb.tokenizer", "--source", own.source, "--base_dir", own.base_dir]
    r = subprocess.run([*run, "--vocab_size", "400"], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout.splitlines()[-1])["vocab_size"] == 400
    for flags, say in ((["--vocab_sise", "400"], "did you mean 'vocab_size'"), (["--vocab_size", "100"], "vocab_size=100")):
        r = subprocess.run([*run, *flags], capture_output=True, text=True)
        assert r.returncode == 2 and say in r.stderr and "Traceback" not in r.stderr
    assert Tokenizer.load(Path(own.base_dir)/"tokenizer").vocab_size == 400

def test_parameters_cell_is_the_dataclass():
    cells = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1
    source = "".join(cells[0]["source"])
    got = {n.target.id: (n.annotation.id, ast.literal_eval(n.value)) for n in ast.parse(source).body}
    assert got == {f.name: (getattr(f.type, "__name__", f.type), f.default) for f in dataclasses.fields(TokenizerSettings)}
    assert [line.split("#")[1].strip() for line in source.splitlines()] == list(field_comments(TokenizerSettings).values())

# ---- the compiled trainer: as plain Python where numba is missing, so these run anywhere ------------------------------

from collections import Counter
from tokenizers import Regex, pre_tokenizers
from nanochat_nb import fastbpe, tokenizer as module

hard_text = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(" \n\r\t\u3000\x85\u200baé\u0301好〇⺀々１Ⅷ。,'"), max_size=60)

def pieces_of(counter):
    return {counter.arena[at >> 32:(at >> 32) + (at & 0xFFFFFFFF)].tobytes(): n for _, _, at, n in counter.rows().tolist()}

@settings(max_examples=150, deadline=None)
@given(st.lists(hard_text, max_size=4), st.sampled_from([(4, 1), (1, 3), (6, 2)]))
def test_the_loop_cuts_as_the_regex_does(texts, limits):
    split = pre_tokenizers.Split(Regex(fastbpe.split_pattern(*limits)), "isolated")
    want = Counter(p.encode() for t in texts for p, _ in split.pre_tokenize_str(t))
    assert pieces_of(fastbpe.PieceCounter(*limits).add(texts)) == want

@settings(max_examples=60, deadline=None)
@given(st.text("aab bc好今", min_size=1, max_size=200), st.sampled_from([265, 290, 400]))
def test_both_trainers_make_one_tokenizer(text, size):
    by_library = train_tokenizer([text], size)
    large, module.LARGE = module.LARGE, 0
    try: assert train_tokenizer([text], size).hash == by_library.hash
    finally: module.LARGE = large

@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=80) | st.text("aab bc好今  \n'.1é", max_size=80), max_size=8), st.sampled_from([265, 300, 420]))
def test_the_compiled_encoder_gives_the_ids_of_the_library(texts, size):
    pytest.importorskip("numba")
    tok = train_tokenizer(["aab abc aabc bca 好今 好好今 a好 ", *texts], size)
    encoder = module._compiled(tok.spec)
    encoder.bits = 4                                       # 16 slots: pieces push each other out
    for _ in range(2):
        ids, ends = encoder(texts, tok.bos_id)
        assert [ids[i:j].tolist() for i, j in zip([0, *ends], ends)] == [[tok.bos_id, *tok.encode(t)] for t in texts]

def test_a_spec_of_another_kind_is_left_to_the_library():
    spec = json.loads(TOK.spec)
    assert module._compiled(json.dumps(spec | {"normalizer": {"type": "NFC"}})) is None
    assert module._compiled(json.dumps(spec | {"model": spec["model"] | {"ignore_merges": True}})) is None
    assert module._compiled(train_tokenizer(["a b"], 265, r"\w+|\W").spec) is None

def test_the_pattern_of_the_book_is_one_of_the_loop():
    assert fastbpe.limits_of(module.SPLIT_PATTERN) == (4, 1)
    for han in (4, 6): assert fastbpe.limits_of(module.recipe_of(TokenizerSettings(han=han), {"shards": []})["pattern"]) == (han, 1)
    assert module.recipe_of(TokenizerSettings(han=6, pattern="x"), {"shards": []})["pattern"] == "x"
    assert fastbpe.limits_of(r"\w+|\W") is None

def test_memory_is_bounded_and_what_stays_is_common():
    texts = [f"w{'abcdefghij'[i % 10]}x " * 3 + "".join(chr(0x4E00 + (i * 7 + k) % 5000) for k in range(8)) for i in range(4000)]
    counter = fastbpe.count_pieces(texts, 4, 1, max_pieces=500, chunk=1000)
    assert counter.n <= 500 and counter.dropped > 0
    assert all(f" w{c}x".encode() in pieces_of(counter) for c in "abcdefghij")

def test_a_large_batch_has_the_ids_of_single_texts():
    texts = [*TEXTS, "-" * 5000, "<|bos|>", "", "🦊" * 50]
    assert sum(map(len, texts)) > module.BATCH
    assert TOK.encode_batch(texts) == [TOK.encode(t) for t in texts]
    ids, ends = TOK.encode_flat(texts)
    assert ends[-1] == len(ids) and not TOK.special_ids & set(ids.tolist())
    with pytest.raises(NanochatError, match="text 1: lone surrogate"): TOK.encode_batch(["a" * module.BATCH, "\ud800"])
