"""Repackaging a gigabyte of text, and downloading from loopback beside curl. Prints one table.

python bench/data.py FOLDER_OF_PARQUET… [--mb 1000] [--only repackage|download]    (curl and openssl for the comparison)"""
import argparse, hashlib, os, shutil, statistics, subprocess, sys, tempfile, time
os.environ |= {"OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
from pathlib import Path
import pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent

def build(source: Path, folder: Path, mb: int) -> int:
    "Repeat the text of a folder until it has `mb` megabytes; the bytes written."
    tables = [pq.read_table(p, columns=["text"]) for p in sorted(source.rglob("*.parquet"))]
    folder.mkdir(parents=True)
    total = i = 0
    while total < mb * 1e6:
        t = tables[i % len(tables)]
        pq.write_table(t, folder / f"{i:03d}.parquet", row_group_size=1024, compression="zstd", use_dictionary=False)
        total, i = total + pc.sum(pc.binary_length(t["text"])).as_py(), i + 1
    return total

def run(*args) -> tuple[float, float, float]:
    "Wall seconds, processor seconds and peak memory in MB of a command."
    start = time.time()
    child = subprocess.Popen([*map(str, args)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, use = os.wait4(child.pid, 0)
    if status: sys.exit(f"{args} failed")
    return time.time() - start, use.ru_utime + use.ru_stime, use.ru_maxrss / 1024

def median(f, k=3): return [statistics.median(x) for x in zip(*(f() for _ in range(k)))]

def row(*cells): print("| " + " | ".join(f"{c:,.0f}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)

def repackaging(sources, mb, tmp):
    for source in sources:
        n = build(source, tmp / "in", mb) / 1e6
        def ours(*more): return run(sys.executable, "-m", "nanochat_nb.repackage", "--source", tmp / "in", "--out", tmp / "out", *more)
        naive = ("import sys; from nanochat_nb.data import *; write_shards((d for p in source_files(sys.argv[1]) for d in read_documents(p)),"
                 " sys.argv[2], source='x')")
        for name, f, k in (("repackage", ours, 3), ("all in memory (`write_shards`)", lambda: run(sys.executable, "-c", naive, tmp / "in", tmp / "out"), 1)):
            wall, cpu, memory = median(f, k)
            row(f"{name}, {source.name}, {n:,.0f} MB", n / wall, n / cpu, memory)
            shutil.rmtree(tmp / "out")
        shutil.rmtree(tmp / "in")

SERVER = """
import hashlib, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
folder = Path(sys.argv[1]); tags = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def do_HEAD(self): self.head()
    def head(self):
        name = self.path.split("/")[-1]
        self.send_response(200); self.send_header("Content-Length", (folder / name).stat().st_size)
        if "/plain/" not in self.path: self.send_header("X-Linked-Etag", tags[name])
        self.end_headers()
        return folder / name
    def do_GET(self):
        with open(self.head(), "rb") as f:
            self.wfile.flush(); at, size = 0, os.fstat(f.fileno()).st_size
            while at < size: at += os.sendfile(self.connection.fileno(), f.fileno(), at, size - at)
s = ThreadingHTTPServer(("127.0.0.1", 0), Hub); print(s.server_port, flush=True); s.serve_forever()
"""

def downloading(tmp, files=32, mb=32):
    (tmp / "www").mkdir()
    for i in range(files): (tmp / "www" / f"{i:02d}").write_bytes(os.urandom(mb << 20))
    server = subprocess.Popen([sys.executable, "-c", SERVER, tmp / "www"], stdout=subprocess.PIPE, text=True)
    address, n, names = f"http://127.0.0.1:{int(server.stdout.readline())}", files * (mb << 20) / 1e6, [f"{i:02d}" for i in range(files)]
    code = ("import sys; from pathlib import Path; from nanochat_nb.fetch import fetch_all; a, d, *n = sys.argv[1:]; "
            "fetch_all([(f'{a}/{x}', Path(d) / x) for x in n], lambda path, info: None, 8)")
    urls = [x for name in names for x in ("-o", tmp / "out" / name, f"{address}/{name}")]
    check = f"openssl dgst -sha256 {tmp}/out/*"
    ways = {"fetch_all, the server tells no sha256": [sys.executable, "-c", code, f"{address}/plain", tmp / "out", *names],
            "fetch_all, size and sha256 checked": [sys.executable, "-c", code, address, tmp / "out", *names],
            "curl --parallel, nothing checked": ["curl", "-sf", "--parallel", "--parallel-max", "8", *urls],
            "curl --parallel, then openssl dgst -sha256": ["sh", "-c", 'curl -sf --parallel --parallel-max 8 "$@" && ' + check, "sh", *urls],
            "python that does nothing but import it": [sys.executable, "-c", "import nanochat_nb.fetch"]}
    got = {k: [] for k in ways}
    for i in range(3):
        for name, args in [*ways.items()][i:] + [*ways.items()][:i]:      # each comes first once
            shutil.rmtree(tmp / "out", ignore_errors=True); (tmp / "out").mkdir(); os.sync()
            got[name].append(run(*args))
    server.kill()
    for name, runs in got.items():
        wall, cpu, memory = (statistics.median(x) for x in zip(*runs))
        row(f"{name}, {files} × {mb} MiB" if "import" not in name else f"{name}: {wall:.2f} s", *((n / wall, n / cpu) if "import" not in name else ("", "")), memory)

if __name__ == "__main__":
    ap = argparse.ArgumentParser(); ap.add_argument("sources", nargs="*", type=Path)
    ap.add_argument("--mb", type=int, default=1000); ap.add_argument("--only", default="")
    a = ap.parse_args()
    row("what", "MB/s wall", "MB/s processor time", "peak MB"); row("---", "---:", "---:", "---:")
    with tempfile.TemporaryDirectory() as tmp:
        if a.only != "download": repackaging(a.sources, a.mb, Path(tmp))
        if a.only != "repackage": downloading(Path(tmp))
    print(f"\nload {os.getloadavg()[0]:.1f}")
