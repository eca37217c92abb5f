"Chat: the command as a process, Ctrl-C in the middle of an answer, long conversations."
import contextlib, os, shutil, subprocess, sys, threading
from dataclasses import asdict
import pytest, torch
from nanochat_nb.chat import ChatWidget, Conversation, chat_loop, command, fit_prompt, token_html
from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.engine import Engine
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.settings import NanochatError
from nanochat_nb.tokenizer import train_tokenizer

TEXTS = [f"{i}+{j} 等于几？你好世界 hello, how much is it?" for i in range(10) for j in range(10)]

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tok = train_tokenizer(TEXTS, 300)
    tok.save(folder/"tokenizer")
    model = GPT(GPTConfig(2, 2, 2, 64, tok.vocab_size, 512))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .3, generator=g)
    save_checkpoint(folder/"sft_checkpoints"/"d4", 7, model, meta=dict(config=asdict(model.cfg), tokenizer_hash=tok.hash))
    return folder, Engine(model, tok)

def chat(base, *args, **kw):
    return subprocess.run([sys.executable, "-m", "nanochat_nb.chat", "--base_dir", base, "--device", "cpu", "--max_tokens", "30", *args],
                          capture_output=True, text=True, encoding="utf-8", **kw)

def test_command(base):
    folder, engine = base
    done = chat(folder, "--temperature", "0", "--dtype", "float32", input="你好\n/new\n你好\n/t 1\n/quit\nnever\n")
    assert done.returncode == 0, done.stderr
    want = engine.chat([{"role": "user", "content": "你好"}], max_tokens=30, temperature=0).replace("\r", "\n")  # a pipe read as text has no \r
    assert done.stdout == f"{want}\n—\n{want}\ntemperature 1\n"
    wrong = chat(folder, "--tag", "d9")
    assert wrong.returncode == 2 and "no checkpoint" in wrong.stderr and "Traceback" not in wrong.stderr

def test_command_says_what_is_wrong(base):
    for args, said in ((("--prompt", "啊" * 500), "shorten it"), (("--prompt", "hi", "--top_k", "-3"), "top_k=-3"), (("--temperature", "-1"), "temperature=-1")):
        done = chat(base[0], *args, input="hi\nhi\n")
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    done = chat(base[0], "--prompt", "你好", "--temperature", "0", "--dtype", "float32")
    want = base[1].chat([{"role": "user", "content": "你好"}], max_tokens=30, temperature=0).replace("\r", "\n")
    assert (done.returncode, done.stdout) == (0, want + "\n") and "sft_checkpoints/d4 answers; others by --stage" in done.stderr

def test_tokens_that_are_no_whole_character_show_their_bytes(base):
    talk = Conversation(base[1])
    talk.ids = base[1].tok.encode("👋你 ok")
    assert command(talk, "/tokens") == r"\xf0|\x9f|\x91|\x8b|你| |o|k"

def test_ctrl_c_ends_the_answer_and_not_the_talk(base):
    talk, out = Conversation(base[1], max_tokens=100, temperature=1.), []
    def write(*a, **kw):
        out.append("".join(a))
        if len(out) == 4: raise KeyboardInterrupt
    chat_loop(talk, ["hello", "/again"], write)
    assert " …" in out and len(talk.messages) == 2 and len(out) > 6

def test_many_turns_never_outgrow_the_context(base):
    talk = Conversation(base[1], max_tokens=60, temperature=1.)
    for i in range(25):
        assert all(talk.ask(f"hello {i} " * 5))
        assert len(talk.ids) <= 60
    assert len(talk.messages) == 50 and "\ufffd" not in "".join(m["content"] for m in talk.messages)

def test_what_was_refused_is_not_part_of_the_talk(base):
    talk, out = Conversation(base[1], max_tokens=20), []
    talk.temperature = float("inf")
    chat_loop(talk, ["hello", "/t inf", "/t -1", "/t 0", "hello"], lambda *a, **kw: out.append("".join(a)))
    assert out[0].startswith("error:") and out[1:3] == ["/t inf: expected a number, 0 or more", "/t -1: expected a number, 0 or more"]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] and talk.messages[1]["content"]

def test_a_long_line_arrives_whole(tmp_path):
    "A terminal by itself cuts a line at 4,095 bytes."
    pty, _ = pytest.importorskip("pty"), pytest.importorskip("readline")
    master, slave = pty.openpty()
    code = "from nanochat_nb.chat import typed; print('ready', flush=True); print('got', len(next(typed())), flush=True)"
    p = subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=subprocess.DEVNULL, env=os.environ | {"LC_ALL": "C.UTF-8", "TERM": "dumb"})
    os.close(slave)
    seen, sent = b"", False
    with contextlib.suppress(OSError):                                # the terminal closes
        while b"got" not in seen or not seen.endswith(b"\n"):
            seen += os.read(master, 65536)
            if not sent and b"> " in seen: sent = True; threading.Thread(target=os.write, args=(master, "好".encode() * 2000 + b"END\n")).start()
    os.close(master); p.wait(30)
    assert b"got 2003" in seen, seen[-200:]

def test_a_reader_who_leaves(base):
    done = subprocess.run(f"{sys.executable} -m nanochat_nb.chat --base_dir {base[0]} --device cpu --prompt 你好 | head -c 1; echo ${{PIPESTATUS[0]}}",
                          shell=True, executable=shutil.which("bash"), capture_output=True)
    assert done.stdout.endswith(b"141\n") and b"Traceback" not in done.stderr and b"Broken" not in done.stderr, done

def test_seeds_advance(base):
    a, b = (Conversation(base[1], max_tokens=20, temperature=1.5, seed=3) for _ in "ab")
    first, second = "".join(a.ask("hello")), "".join(a.again())
    assert first != second and ["".join(b.ask("hello")), "".join(b.again())] == [first, second]

def test_widget_streams_and_shows_tokens(base, monkeypatch):
    pytest.importorskip("ipywidgets")
    plain, quiet = base[1].model.logits, torch.tensor(sorted(base[1].tok.special_ids))
    monkeypatch.setattr(base[1].model, "logits", lambda x: plain(x).index_fill(-1, quiet, -torch.inf))  # text only
    window, seen = ChatWidget(base[1], lang="en", temperature=1.0, max_tokens=30), []
    window.log.observe(lambda c: seen.append(c.new), "value")
    window.text.value = "<b>hello</b>"
    assert len(seen) > 5 and "<b>" not in window.log.value and window.text.value == ""
    window.tokens.value = True
    assert window.log.value.endswith(token_html(base[1].tok, window.talk.ids))
    window.text.value = "啊" * 600
    assert "shorten it" in window.log.value and len(window.talk.messages) == 2
    assert window.text.value == "啊" * 600                                # it can be shortened
    window.text.value = "啊"
    assert window.text.value == "" and len(window.talk.messages) == 4

def test_widget_options(base):
    pytest.importorskip("ipywidgets")
    assert ChatWidget(base[1], temperature=2.0).warm.value == 2
    for bad, said in ((dict(lang="fr"), "unknown lang 'fr'"), (dict(temperature=-1.), "temperature=-1")):
        with pytest.raises(NanochatError, match=said): ChatWidget(base[1], **bad)

def test_what_a_model_reads_of_a_long_talk(base):
    engine, say = base[1], lambda role, text: {"role": role, "content": text}
    talk = [say(r, f"turn {i} " * (1 + i % 5)) for i in range(400) for r in ("user", "assistant")] + [say("user", "hi")]
    for head in ([], [say("system", "be brief")]):
        first = next(n for n in range(0, 802, 2) if len(engine.tok.render_prompt(head + talk[n:])) <= 512 - 100)
        assert fit_prompt(engine, head + talk, 100) == engine.tok.render_prompt(head + talk[first:])
    long = [say("user", "hello " * 300)]                                # alone it may take the room of the answer
    assert 256 < len(engine.tok.render_prompt(long)) < 512 and fit_prompt(engine, talk[:-1] + long, 300) == engine.tok.render_prompt(long)
    with pytest.raises(Exception, match="the context holds 512; shorten it"): fit_prompt(engine, [say("user", "hello " * 900)], 100)

def test_new_forgets_words_and_tokens(base):
    talk = Conversation(base[1], max_tokens=5)
    list(talk.ask("hi"))
    assert talk.ids and command(talk, "/new") == "—" and talk.messages == talk.ids == []
