"Server: real sockets, the openai client, many guests at once, guests who leave, a browser."
import asyncio, gc, json, os, random, re, shutil, signal, socket, statistics, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
pytest.importorskip("fastapi"); pytest.importorskip("uvicorn"); httpx = pytest.importorskip("httpx")
import uvicorn
from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.engine import Engine, Request
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.server import Refused, ServerSettings, Worker, answer, at_stop, make_app, read_body, read_request
from nanochat_nb.settings import NanochatError
from nanochat_nb.tokenizer import train_tokenizer

TEXTS = [f"{i}+{j} 等于几 how much is it 你好世界 hello 👋" for i in range(10) for j in range(10)]
ASK = [{"role": "user", "content": "你好, hello"}]

def babbler(seq_len=512, seed=0):
    "A random model that never stops by itself: the longest and the oddest answers there are."
    tok = train_tokenizer(TEXTS, 300)
    model = GPT(GPTConfig(1, 2, 2, 32, tok.vocab_size, seq_len))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .4, generator=g)
    plain, quiet = model.logits, torch.tensor(sorted(tok.special_ids))
    model.logits = lambda x: plain(x).index_fill(-1, quiet, -torch.inf)
    return Engine(model, tok)

class Site:
    "A server on a free port, in a thread of its own."
    def __init__(self, **kw):
        self.cfg = ServerSettings(**({"port": 0, "max_tokens": 400, "temperature": 1.0} | kw))
        self.worker = Worker(babbler(), self.cfg.rows)
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(make_app(self.worker, self.cfg, "toy"), log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=lambda: self.server.run([self.sock]), daemon=True)
        self.thread.start()
        for _ in range(200):
            if self.server.started: break
            time.sleep(.05)
    def load(self): return (h := httpx.get(self.url + "/health").json())["running"], h["waiting"]
    def calm(self, seconds=10):
        "Wait until nothing runs."
        end = time.time() + seconds
        while self.load() != (0, 0) and time.time() < end: time.sleep(.05)
        return self.load() == (0, 0)
    def close(self):
        self.server.should_exit = True
        self.thread.join(10)
        self.worker.close()

@pytest.fixture(scope="module")
def site():
    s = Site()
    yield s
    s.close()
    assert not s.thread.is_alive() and not s.worker.thread.is_alive()


def test_openai_client(site):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=site.url + "/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["toy"] == [client.models.retrieve("toy").id]
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"): client.models.retrieve("gpt-4")
    talk = dict(model="toy", messages=ASK, max_tokens=60, seed=7)
    whole = client.chat.completions.create(**talk)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 60
    pieces = list(client.chat.completions.create(**talk, stream=True, stream_options={"include_usage": True}))
    said = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert said == whole.choices[0].message.content and "\ufffd" not in said
    assert pieces[-1].usage.completion_tokens == 60 and pieces[-2].choices[0].finish_reason == "length"
    more = ASK + [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "再说一遍"}]
    assert client.chat.completions.create(**talk | dict(messages=more)).choices[0].message.content
    end = next(c for c in said[5:] if said.index(c) > 2)
    cut = client.chat.completions.create(**talk, stop=[end])
    assert cut.choices[0].message.content == said[:said.index(end)] and cut.choices[0].finish_reason == "stop"
    cut = [client.chat.completions.create(**talk, stop=[end]).usage.completion_tokens for _ in range(8)]
    assert len({*cut}) == 1 and cut[0] <= 60                     # however far the engine had got
    one = [client.chat.completions.create(**talk | dict(messages=[{"role": r, "content": "be brief"}, *ASK])) for r in ("developer", "system")]
    assert one[0].choices[0].message == one[1].choices[0].message != whole.choices[0].message
    for kw in (dict(logprobs=True), dict(response_format={"type": "json_object"}), dict(frequency_penalty=.5), dict(tools=[{"type": "function"}])):
        with pytest.raises(openai.BadRequestError, match=f"{[*kw][0]}: not to be had"): client.chat.completions.create(**talk, **kw)
    plain = dict(logprobs=False, response_format={"type": "text"}, frequency_penalty=0, tools=[])
    assert client.chat.completions.create(**talk, **plain).choices[0].message == whole.choices[0].message
    with pytest.raises(openai.BadRequestError, match="temperature=-1"): client.chat.completions.create(**talk, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="roles alternate"):
        client.chat.completions.create(**talk | dict(messages=[{"role": "assistant", "content": "hi"}]))

def test_stop_strings_split_over_pieces():
    for stops, want in ((["END"], "ab"), (["EN", "abEX"], "ab"), (["X"], "abENDc"), (["c"], "abEND")):
        shown, held, met = "", "", False
        for c in "abENDc":
            text, held, met = at_stop(held + c, stops)
            shown += text
            if met: break
        assert shown + ("" if met else held) == want

def test_a_stop_is_met_at_the_same_place_in_pieces_of_any_size():
    rng = random.Random(0)
    for _ in range(3000):
        text, *stops = ("".join(rng.choices("abc", k=rng.randint(1, n))) for n in (12, 4, 4, 2))
        ends = [(i, i - len(s)) for i in range(len(text) + 1) for s in stops if text[:i].endswith(s)]
        assert (at_stop(text, stops)[0] if ends else text) == text[:min(ends)[1] if ends else None], (text, stops)

async def first_piece(url, i):
    "Seconds until the first text of a streamed answer, which is then read to its end."
    start, first = time.perf_counter(), 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    body = json.dumps({"messages": ASK, "stream": True, "max_tokens": 100, "seed": i}).encode()
    writer.write(POST % (len(body), body))
    async for line in reader:
        if b'"content"' in line and b'"content": ""' not in line: first = first or time.perf_counter() - start
        if b"[DONE]" in line: break
    writer.close()
    return first

POST = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s")

async def crowd(url): return await asyncio.gather(*(first_piece(url, i) for i in range(32)))

def test_no_stream_starves(site):
    "The guests are a process of their own, so that they do not take turns with the server."
    program = "import asyncio, json, sys; from test_server import crowd; print(json.dumps([asyncio.run(crowd(sys.argv[1])) for _ in range(2)]))"
    done = subprocess.run([sys.executable, "-c", program, site.url], cwd=Path(__file__).parent, capture_output=True, text=True)
    first = sorted(json.loads(done.stdout)[1])                   # the first crowd warms up
    assert len(first) == 32 and first[0] > 0 and first[-1] <= 3 * statistics.median(first), first

def leave(url, n, streamed=True):
    "n guests who hang up: some at once, some after a few pieces."
    async def guest(i):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        body = json.dumps({"messages": ASK, "stream": streamed, "max_tokens": 400}).encode()
        writer.write(POST % (len(body), body))
        await writer.drain()
        if i % 4: await asyncio.wait_for(reader.read(300), 60) if streamed else await asyncio.sleep(.02)
        writer.transport.abort()
    async def main():
        for k in range(0, n, 50): await asyncio.gather(*(guest(i) for i in range(k, min(n, k + 50))))
    asyncio.run(main())

def memory(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else 0

@pytest.mark.parametrize("n", [int(os.environ.get("N_ABORTS", 200))])
def test_guests_who_leave_leave_nothing(site, n):
    leave(site.url, 60); leave(site.url, 20, streamed=False)
    assert site.calm()
    gc.collect()
    objects, used, threads = len(gc.get_objects()), memory(), threading.active_count()
    leave(site.url, n); leave(site.url, n // 10, streamed=False)
    assert site.calm()
    gc.collect()
    assert len(gc.get_objects()) - objects < 5 * n ** .5 + 1000 and memory() - used < 30e6 and threading.active_count() <= threads + 2
    assert not site.worker.running or all(q.ended for q in site.worker.running)
    r = httpx.post(site.url + "/v1/chat/completions", json={"messages": ASK, "max_tokens": 9}, timeout=60)
    assert r.json()["usage"]["completion_tokens"] == 9            # and the server is as good as new

def test_command_says_where_it_listens(tmp_path):
    e = babbler()
    e.tok.save(tmp_path/"tokenizer")
    save_checkpoint(tmp_path/"sft_checkpoints/d2", 1, e.model, meta=dict(config=vars(e.model.cfg), tokenizer_hash=e.tok.hash))
    command = [sys.executable, "-m", "nanochat_nb.server", "--base_dir", str(tmp_path), "--device", "cpu", "--compile", "false", "--port"]
    p = subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = p.stdout.readline().split()[0]
        assert httpx.get(url + "/health", timeout=60).status_code == 200
        taken = subprocess.run([*command, url.rpartition(":")[2]], capture_output=True, text=True)
        assert taken.returncode == 2 and "choose another --port" in taken.stderr and taken.stderr.count("\n") == 1
        half = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        half.sendall(POST % (100, b"{"))                              # someone who never ends does not delay the end, nor litter it
        assert httpx.get(url + "/health", timeout=60).status_code == 200
    finally: p.send_signal(signal.SIGINT); out, err = p.communicate(timeout=30)
    assert (p.returncode, out, err) == (0, "", "")

def test_a_key_need_not_be_ascii():
    site = Site(rows=1, api_key="钥匙")
    try: assert [httpx.get(site.url + "/v1/models", headers={"Authorization": f"{how} {k}".encode()}).status_code
                 for how, k in (("Bearer", "钥匙"), ("bearer", "钥匙"), ("Bearer", "k"), ("Basic", "钥匙"))] == [200, 200, 401, 401]
    finally: site.close()

def test_limits():
    site = Site(rows=1, queue=1, api_key="open sesame")
    try:
        def post(key="open sesame", **kw):
            head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            return httpx.post(site.url + "/v1/chat/completions", headers=head, timeout=60, **kw)
        assert post("wrong", json={}).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(site.url + "/v1/models").status_code == 401 and httpx.get(site.url + "/health").status_code == 200
        assert post(json={"messages": ASK, "max_tokens": 401}).status_code == 400
        assert post(content=b'{"messages": "' + b"x" * 1_000_100 + b'"}').status_code == 413
        results = []
        guests = [threading.Thread(target=lambda: results.append(post(json={"messages": ASK}).status_code)) for _ in range(12)]
        for g in guests: g.start()
        for g in guests: g.join()
        assert results.count(429) >= 1 and results.count(200) >= 2 and len(results) == 12, results
    finally: site.close()

def test_a_crowd_at_once_meets_the_limit():
    site = Site(rows=1, queue=2)
    async def crowd():
        async with httpx.AsyncClient(timeout=60) as http:
            ask = lambda i: http.post(site.url + "/v1/chat/completions", json={"messages": ASK, "stream": i % 2 == 0})
            return [r.status_code for r in await asyncio.gather(*map(ask, range(20)))]
    try: assert sorted(asyncio.run(crowd())) == [200] * 3 + [429] * 17
    finally: site.close()

def test_a_guest_who_comes_later_need_not_wait(site):
    "Uncompiled, the batch shrinks to the one row that runs; it must grow again."
    done = []
    def tell(i): return lambda new, ended: done.append(i) if ended else None
    long, short = (Request([1], n, tools=False) for n in (450, 5))
    site.worker.submit(long, tell("long"))
    while len(long.out) < 20: time.sleep(.001)
    site.worker.submit(short, tell("short"))
    while len(done) < 2: time.sleep(.01)
    assert done == ["short", "long"]

def test_what_cannot_fit_is_refused_before_it_is_encoded(site, monkeypatch):
    tok, read = site.worker.engine.tok, []
    encode = tok.encode
    monkeypatch.setattr(tok, "encode", lambda text, *a, **kw: read.append(len(text)) or encode(text, *a, **kw))
    turns = [{"role": r, "content": "x"} for _ in range(1000) for r in ("user", "assistant")] + [{"role": "user", "content": "x"}]
    for talk, forget, said in (([{"role": "system", "content": "x " * 400_000}, *turns], "auto", "the system message and the last have at least"),
                               ([{"role": "user", "content": "你" * 300_000}], "auto", "the message has at least"),
                               ([{"role": "user", "content": "你" * 300_000}], None, "leave no room")):
        with pytest.raises(NanochatError, match=said): read_request({"messages": talk, "truncation": forget}, site.worker.engine, site.cfg)
        assert sum(read) == 0
    read_request({"messages": turns, "truncation": "auto", "max_tokens": 3}, site.worker.engine, site.cfg)
    assert 100 < sum(read) < 5000                                # of 2,001 turns those that may fit, a few times

def test_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr("nanochat_nb.server.MAX_SECONDS", .3)
    async def receive(): await asyncio.sleep(.05); return {"type": "http.request", "body": b" ", "more_body": True}
    asked = SimpleNamespace(headers={"content-type": "application/json"}, receive=receive)
    with pytest.raises(Refused) as e: asyncio.run(read_body(asked))
    assert e.value.status == 408

def test_a_guest_who_leaves_while_asking():
    parts = [{"type": "http.request", "body": b'{"mess', "more_body": True}, {"type": "http.disconnect"}]
    async def receive(): return parts.pop(0)
    asked = SimpleNamespace(headers={"content-type": "Application/JSON"}, receive=receive)
    with pytest.raises(Refused) as e: asyncio.run(read_body(asked))
    assert e.value.status == 499

@pytest.mark.parametrize("kind", ["text/plain", "text/plain; application/json", "text/plain; x=application/json", ""])
def test_what_a_page_elsewhere_can_send_unasked_is_refused(site, kind):
    r = httpx.post(site.url + "/v1/chat/completions", content=json.dumps({"messages": ASK}), headers={"Content-Type": kind}, timeout=60)
    assert r.status_code == 415

def test_a_long_stop_string_costs_no_more_than_what_is_held():
    began = time.perf_counter()
    for i in range(100): assert at_stop("some text", ["z" * 900_000]) == ("some text", "", False)
    assert time.perf_counter() - began < 1

def test_whoever_is_waiting_hears_of_the_end(site):
    for delay in (0, .002, .01, .05):
        worker, told = Worker(site.worker.engine, 2), []
        for i in range(5): worker.submit(Request([1], 400, tools=False), lambda new, ended, i=i: told.append(i) if ended else None)
        time.sleep(delay); worker.close()
        assert {*told} == {*range(5)}, delay

def test_a_worker_serves_two_event_loops(site):
    "Each answer goes to the loop that asked, though the steps of the engine are shared."
    got = {}
    def ask(i):
        async def collect(): return [piece async for piece in answer(site.worker, Request([1, 5 + i], 20 if i else 450, 0, tools=False), [])]
        got[i] = asyncio.run(asyncio.wait_for(collect(), 20))           # the first loop outlives the others
    guests = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for g in guests: g.start()
    for g in guests: g.join()
    assert [got[i][-1][1] for i in range(4)] == ["length"] * 4

def test_whole_answers_cut_by_the_end_of_the_server_are_errors():
    site, results = Site(rows=2), []
    model, body = site.worker.engine.model, {"messages": ASK, "max_tokens": 400}
    quick = model.logits
    def slow(x): time.sleep(.01); return quick(x)                     # four seconds an answer: the end comes in its middle
    model.logits = slow
    def ask(**kw): results.append(httpx.post(site.url + "/v1/chat/completions", json=body | kw, timeout=60))
    guests = [threading.Thread(target=ask, kwargs=kw) for kw in ({}, {"stream": True})]
    for g in guests: g.start()
    while site.load()[0] < 2 and not results: time.sleep(.01)
    site.worker.close()
    for g in guests: g.join()
    site.close()
    assert sorted(r.status_code for r in results) == [200, 503]                # a stream's status is sent before its end
    assert all("the server is closing" in r.text for r in results)

def test_wrong_addresses_and_flags(site):
    post = lambda **kw: httpx.post(site.url + "/v1/chat/completions", json={"messages": ASK, "max_tokens": 3} | kw, timeout=60)
    for r, status in ((httpx.get(site.url + "/v1/none"), 404), (httpx.get(site.url + "/v1/chat/completions"), 405),
                      (post(stream="false"), 400), (post(stop=0), 400), (post(stop={}), 400), (post(stop=[""]), 400)):
        assert r.status_code == status and r.json()["error"]["message"], r.text
    assert "allow" in httpx.get(site.url + "/v1/chat/completions").headers
    for kw in (dict(stop=None), dict(stop=[]), dict(stream=None)): assert post(**kw).status_code == 200, kw

def test_odd_requests_get_a_sentence_not_a_crash(site):
    def post(extra): return httpx.post(site.url + "/v1/chat/completions", content=extra, headers={"Content-Type": "application/json"}, timeout=60)
    talk = '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, '
    for extra in ('"max_completion_tokens": Infinity', '"n": 1e999', '"temperature": 1' + "0" * 400, '"top_p": NaN'):
        r = post(talk + extra + "}")
        assert r.status_code == 400 and "expected a" in r.json()["error"]["message"], (extra, r.text)
    assert post("[" * 100_000).json()["error"]["code"] == "not_json"
    assert post(talk + '"top_k": 1' + "0" * 400 + "}").status_code == 200    # all tokens, as any number beyond the vocabulary

def test_a_long_talk_forgets_its_beginning_if_asked_to(site):
    def post(**kw): return httpx.post(site.url + "/v1/chat/completions", json={"max_tokens": 3} | kw, timeout=60)
    rules = {"role": "system", "content": "be brief"}
    turns = [{"role": r, "content": f"turn {i} " * 9} for i in range(40) for r in ("user", "assistant")]
    talk, room = [rules, *turns, *ASK], site.worker.engine.seq_len - 3
    refused = [post(messages=talk), post(messages=talk, truncation="disabled"), post(messages=talk, truncation="half")]
    assert [r.status_code for r in refused] == [400] * 3 and "truncation" in refused[2].text and "no room" in refused[1].text
    tok, cfg = site.worker.engine.tok, site.cfg
    q, *_ = read_request({"messages": talk, "max_tokens": 3, "truncation": "auto"}, site.worker.engine, cfg)
    assert q.prompt in [tok.render_prompt([rules, *turns[n:], *ASK]) for n in range(2, 81, 2)] and room - 60 < len(q.prompt) <= room
    assert post(messages=talk, truncation="auto").status_code == 200
    assert post(messages=[rules, {"role": "user", "content": "long " * 2000}], truncation="auto").status_code == 400

def test_usage_is_sent_where_it_is_asked_for(site):
    for options, n in ((None, 0), ({"include_usage": False}, 0), (5, 0), ({"include_usage": True}, 1)):
        body = {"messages": ASK, "max_tokens": 3, "stream": True, "stream_options": options}
        assert httpx.post(site.url + "/v1/chat/completions", json=body, timeout=60).text.count('"usage"') == n, options

def test_an_engine_that_fails_says_so(capfd):
    site = Site(rows=2)
    site.worker.engine.model.head = None
    try:
        r = httpx.post(site.url + "/v1/chat/completions", json={"messages": ASK}, timeout=60)
        assert r.status_code == 500 and r.json()["error"]["code"] == "engine"
        assert httpx.get(site.url + "/health").status_code == 503
        assert "the engine stopped" in httpx.post(site.url + "/v1/chat/completions", json={"messages": ASK, "stream": True}, timeout=60).text
    finally: site.close()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

def until(page, said):
    "Wait for what a script says; the page's own policy forbids to evaluate text in it."
    for _ in range(600):
        if page.evaluate(said): return
        page.wait_for_timeout(50)
    raise AssertionError(said)

@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_page_in_a_browser(site, tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page = browser.new_page(viewport={"width": 900, "height": 640}, locale="zh-CN")
        problems, asked = [], []
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" and "favicon" not in str(m.location) else None)
        page.on("request", lambda r: asked.append(r.url))
        page.goto(site.url)
        assert page.inner_text("#send") == "发送"
        page.fill("#text", "你好 <b>world</b>"); page.press("#text", "Enter"); page.locator(".assistant").wait_for()
        page.locator("#stop:disabled").wait_for(timeout=30000)
        assert page.locator(".assistant").count() == 1
        said = page.inner_text(".assistant")
        assert len(said) > 50 and "\ufffd" not in said and page.inner_text(".user") == "你好 <b>world</b>"
        page.click("#again")     # busy at once; an answer may be quicker than a look
        page.locator("#stop:disabled").wait_for(timeout=30000)
        assert page.locator(".assistant").count() == 1
        page.click("#lang")
        assert page.inner_text("#send") == "Send"
        page.fill("#text", "more"); page.evaluate("() => { $('send').click(); $('stop').click() }")
        page.wait_for_selector(".assistant >> nth=1")
        page.locator("#stop:disabled").wait_for()
        page.screenshot(path=os.environ.get("SCREENSHOT", str(tmp_path/"page.png")))
        page.fill("#text", "long " * 600); page.click("#send"); page.locator(".error").wait_for()   # refused: it is given back
        assert page.input_value("#text").startswith("long long")
        assert page.locator(".user").count() == 2 and page.locator(".assistant").count() == 2           # and taken off the page
        page.fill("#text", "short"); page.click("#send"); page.wait_for_selector(".assistant >> nth=2")  # … and the talk goes on
        page.locator("#stop:disabled").wait_for(timeout=30000)
        assert page.locator(".error").count() == 1 and problems and all("400" in x for x in problems)
        page.evaluate("() => { for (let i = 0; i < 80; i++) messages.push({role: i % 2 ? 'assistant' : 'user', content: 'turn '.repeat(9)}) }")
        page.fill("#text", "short"); page.click("#send"); page.wait_for_selector(".assistant >> nth=3")  # forgets the oldest
        page.locator("#stop:disabled").wait_for(timeout=30000)
        assert page.locator(".error").count() == 1
        old = page.locator(".assistant").last.inner_text()
        page.route("**/completions", lambda r: r.fulfill(status=502, body="<html>no</html>"))
        page.fill("#text", "a draft"); page.click("#again"); until(page, "() => !running && $('log').lastChild.className == 'm error'")
        assert "502" in page.inner_text(".error") and page.input_value("#text") == "a draft"      # what there was stays
        assert page.locator(".assistant").last.inner_text() == old and page.evaluate("messages.at(-1).content") == old
        page.click("#send"); until(page, "() => $('text').value == 'a draft'")
        page.unroute("**/completions")
        page.click("#fresh")
        assert page.locator(".m").count() == 0
        assert all(u.startswith(site.url) for u in asked)             # nothing from elsewhere
        locked, page = Site(rows=1, api_key="钥匙"), browser.new_page()
        try:
            page.on("dialog", lambda d: d.accept("钥匙"))             # a header holds bytes, not characters
            page.goto(locked.url); page.fill("#text", "hi"); page.click("#send")
            until(page, "() => messages.length == 2 && !running"); assert page.locator(".error").count() == 0
        finally: locked.close()
        browser.close()
    assert site.calm()
