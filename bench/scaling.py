"""Several ranks of one host: speed, exposed communication and memory at 1, 2, 4, 8 ranks, and a run whose number of ranks changes.

python bench/scaling.py SOURCE [--ranks 1 2 4 8] [--depths 12 20] [--fp8] [--shard] [--out FILE.jsonl]     rows of the table
python bench/scaling.py --table FILE.jsonl                                                                 the table of all rows there
python bench/scaling.py SOURCE --elastic resize kill [--ranks 2] [--out FILE.jsonl]                        N → N/2 → N, a killed rank

SOURCE is a folder of shards, or files separated by commas, as for pretraining; a tokenizer of 32,768 and a token cache are made of it
in the base folder. Every row is a torchrun of its own: 524,288 tokens a step for all ranks together, whatever their number
(`--weak`: for each rank), read by the loader of pretraining. Exposed communication is time in which a GPU runs communication
kernels and nothing else, in a trace of one step. Efficiency is against the row of the same kind with the fewest ranks. `--device cpu`
tries all of it without a GPU (gloo).
"""
import argparse, atexit, json, os, shutil, signal, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KEPT = ("depth", "fp8", "shard", "weak", "device")   # rows that agree in these are compared

def exposed_ms(events):
    "(ms in which only communication runs, ms of communication) of (start, end, is communication) in microseconds."
    edges = sorted([(s, 1, c) for s, _, c in events] + [(e, -1, c) for _, e, c in events])
    count, alone, comm, before = {True: 0, False: 0}, 0.0, 0.0, None
    for at, change, is_comm in edges:
        if before is not None:
            if count[True]: comm += at - before
            if count[True] and not count[False]: alone += at - before
        count[is_comm] += change; before = at
    return alone / 1000, comm / 1000

def traced(step):
    "Exposed and whole communication of one step, from its first computing kernel on, and its ms by name; None without a GPU."
    import torch, torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile, schedule
    if not torch.cuda.is_available(): step(); return None, None, {}
    with profile(activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=2, active=1)) as prof:
        for i in range(3):
            if i: prof.step()                            # the third is recorded
            if dist.is_initialized(): dist.barrier()     # the profiler does not start on all ranks at once
            step(); torch.cuda.synchronize()
    rows = [(e.time_range.start, e.time_range.end, "nccl" in e.name.lower(), e.name) for e in prof.events()
            if e.device_type.name == "CUDA" and not e.name.startswith(("ProfilerStep", "nccl:"))]           # those are notes, not kernels
    begin, names = min(s for s, _, comm, _ in rows if not comm), {}
    rows = [r for r in rows if r[0] >= begin]
    for s, e, comm, name in rows:
        if comm: names[name[:60]] = round(names.get(name[:60], 0) + (e - s) / 1000, 2)
    return *exposed_ms([r[:3] for r in rows]), names

def prepare(run):
    "The tokenizer and the cache of tokens, made once."
    from nanochat_nb.data import find_data
    from nanochat_nb.loader import prepare_cache
    from nanochat_nb.pretrain import open_tokenizer
    data = find_data(run["source"], run["base"])
    prepare_cache(data, open_tokenizer(run["source"], run["base"], run["vocab"], run["vocab"]), run["base"])

def rank(run):
    "One rank: the steps of pretraining, timed."
    import torch
    from nanochat_nb.data import find_data
    from nanochat_nb.loader import TextLoader, prepare_cache
    from nanochat_nb.model import GPT, config_from_depth
    from nanochat_nb.pretrain import PretrainSettings, Trainer, fill, open_tokenizer
    from nanochat_nb.runtime import all_reduce_mean, close_runtime, freeze_gc, init_runtime, peak_flops
    rt, T, base = init_runtime(run["device"], "", 0), run["seq_len"], run["base"]
    batch = run["batch"] * (rt.world_size if run["weak"] else 1)
    cfg = fill(PretrainSettings(depth=run["depth"], batch_tokens=batch, seq_len=T, num_iterations=1000, fp8=run["fp8"], shard=run["shard"],
                                base_dir=base, compile=run["device"] == "cuda"))
    data, tok = find_data(run["source"], base), open_tokenizer(run["source"], base, run["vocab"], run["vocab"])
    loader = TextLoader(data, tok, seq_len=T, batch_rows=batch // T, rank=rt.rank, world_size=rt.world_size, cache=prepare_cache(data, tok, base))
    model = GPT(config_from_depth(run["depth"], tok.vocab_size, T, run["arch"]))
    t = Trainer(cfg, rt, tok, model, loader, Path(base), 1000, min(cfg.device_batch, batch // T // rt.world_size), batch)
    t.peak, fast, at = peak_flops(rt), t.fast_model(), iter(range(1000))
    began = time.time(); t.train_step(fast, next(at)); first = time.time() - began
    freeze_gc()
    for _ in range(2): t.train_step(fast, next(at))
    rows = [t.train_step(fast, next(at)) for _ in range(run["steps"])]
    alone, comm, names = traced(lambda: t.train_step(fast, next(at)))
    held = sum(v.numel() * v.element_size() for s in t.opt.state.values() for v in s.values())
    value = torch.tensor([statistics.median(r["tok_per_s"] for r in rows), statistics.median(r["loader_ms"] for r in rows)], device=rt.device)
    all_reduce_mean([value])
    if rt.is_main: print("ROW " + json.dumps({k: v for k, v in run.items() if k not in ("source", "base")} | dict(
        tok_per_s=round(value[0].item()), loader_ms=round(value[1].item(), 2), tokens_a_step=batch, first_step_s=round(first, 1),
        exposed_ms=alone, communication_ms=comm, kernels=names, step_ms=round(statistics.median(r["step_ms"] for r in rows), 1),
        memory_gb=round((rows[-1]["mem"] or 0) / 1e9, 2), optimizer_gb=round(held / 1e9, 3), loss=rows[-1]["loss"])), flush=True)
    close_runtime()

def torchrun(n, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *map(str, args)]

def table(rows):
    print("| run | ranks | tokens/s | efficiency | step ms | exposed communication ms | share of the step | memory GB a rank | optimiser GB a rank | loader ms | first step s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for r in sorted(rows, key=lambda r: ([r[k] for k in KEPT], r["ranks"])):
        least = min((x for x in rows if [x[k] for k in KEPT] == [r[k] for k in KEPT]), key=lambda x: x["ranks"])
        eff = r["tok_per_s"] / r["ranks"] / (least["tok_per_s"] / least["ranks"])
        alone, part = ("–", "–") if r["exposed_ms"] is None else (f"{r['exposed_ms']:.1f}", f"{r['exposed_ms'] / r['step_ms']:.1%}")
        name = f"d{r['depth']}" + ", eight bits" * r["fp8"] + ", sharded" * r["shard"] + ", more tokens a step" * r["weak"]
        print(f"| {name} | {r['ranks']} | {r['tok_per_s']:,} | {f'{eff:.1%}' if r is not least else '–'} | {r['step_ms']} | {alone} | {part} | {r['memory_gb']} | {r['optimizer_gb']} | "
              f"{r['loader_ms']} | {r['first_step_s']} |")

def elastic(a):
    "Losses of N → N/2 → N ranks by resume, and of a run that loses a rank, beside an undisturbed run of N."
    from nanochat_nb.runtime import read_metrics
    n, steps, depth, losses, order = a.ranks[-1], a.steps, a.depths[0], {}, {}
    common = ["--source", a.source, "--depth", depth, "--vocab_size", a.vocab, "--eval_every", steps, "--save_every", max(1, steps // 8), "--keep", 0, "--seed", 1,
              "--token_cache", "--batch_tokens", a.batch, "--seq_len", a.seq_len, "--num_iterations", steps, "--device", a.device, *(["--fp8"] if a.fp8 else [])]
    with tempfile.TemporaryDirectory() as tmp:
        def go(base, ranks, until, *more, kill=False):
            base, began = Path(tmp) / base, time.time()
            for part in ("tokenizer", "tokenized_data"):   # made before: no run waits for them
                old, new = Path(a.base) / part, base / part
                if old.exists() and not new.exists():
                    new.parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if old.is_dir() else shutil.copy)(old, new)
            p = subprocess.Popen(torchrun(ranks, *(["--max_restarts", 1] if kill else []), "-m", "nanochat_nb.pretrain", *common, *more), cwd=ROOT,
                                 env=os.environ | {"NANOCHAT_BASE_DIR": str(base)})
            folder = base / "base_checkpoints" / f"d{depth}"
            rows = lambda: [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
            while p.poll() is None and until < steps and len(rows()) < until: time.sleep(.2)
            if kill:
                victim = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()[-1]
                print(f"after {len(rows())} steps: kill -9 {victim}, a rank", flush=True)
                os.kill(int(victim), signal.SIGKILL)
            elif p.poll() is None and until < steps: p.send_signal(signal.SIGTERM)
            p.wait()
            print(f"{base.name}: {ranks} ranks, {len(rows())} steps are done, {time.time() - began:.0f} s, status {p.returncode}", flush=True)
            last = max(folder.glob("step_*"), key=lambda f: int(f.name[5:]))
            return [r["loss"] for r in rows()], json.loads((last / "meta.json").read_text())["loader"]
        losses["undisturbed"], order["undisturbed"] = go("a", n, steps)
        if "resize" in a.elastic:
            go("b", n, steps // 3); go("b", max(1, n // 2), 2 * steps // 3, "--resume")
            name = f"{n}, then {max(1, n // 2)}, then {n} ranks"
            losses[name], order[name] = go("b", n, steps, "--resume")
        if "kill" in a.elastic: losses["a rank killed"], order["a rank killed"] = go("c", n, steps // 2, kill=True)
    if a.out: Path(a.out).open("a").write(json.dumps(dict(elastic=losses, depth=depth, ranks=n, tokens_a_step=a.batch, steps=steps)) + "\n")
    print("| run | steps | the loader ends at the same place | largest difference of a loss, first quarter | of any loss | last loss |\n|---|---|---|---|---|---|")
    for name, x in losses.items():
        off = [abs(p - q) for p, q in zip(x, losses["undisturbed"], strict=True)]
        same = "yes" if order[name] == order["undisturbed"] else "no"
        print(f"| {name} | {len(x)} | {same} | {max(off[:steps // 4]):.2g} | {max(off):.2g} | {x[-1]:.4f} |")

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("source", nargs="?", default=""); ap.add_argument("--base", default="", help="folder for tokenizer and cache; empty: a temporary one")
    ap.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8]); ap.add_argument("--depths", type=int, nargs="*", default=[12, 20])
    ap.add_argument("--steps", type=int, default=0, help="0: 10 timed ones, 200 in the elastic runs"); ap.add_argument("--batch", type=int, default=524288)
    ap.add_argument("--seq_len", type=int, default=2048); ap.add_argument("--vocab", type=int, default=32768); ap.add_argument("--arch", default="modern")
    ap.add_argument("--fp8", action="store_true"); ap.add_argument("--shard", action="store_true"); ap.add_argument("--weak", action="store_true")
    ap.add_argument("--device", default="cuda"); ap.add_argument("--out", default=""); ap.add_argument("--table", default="")
    ap.add_argument("--elastic", nargs="+", choices=["resize", "kill"], default=[]); ap.add_argument("--one", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.one: return rank(json.loads(a.one))
    if a.table: return table([r for r in map(json.loads, Path(a.table).read_text().splitlines()) if "elastic" not in r])
    if not a.source: ap.error("SOURCE is missing: a folder of shards")
    if not a.base: a.base = tempfile.mkdtemp(); atexit.register(shutil.rmtree, a.base, True)
    a.steps, rows = a.steps or (200 if a.elastic else 10), []
    a.source = ",".join(str(Path(s).resolve()) for s in a.source.split(","))
    prepare(vars(a))
    if a.elastic: return elastic(a)
    for depth in a.depths:
        for n in a.ranks:
            run = dict(depth=depth, ranks=n, **{k: getattr(a, k) for k in ("source", "base", "steps", "batch", "seq_len", "vocab", "arch", "fp8", "shard", "weak", "device")})
            done = subprocess.run(torchrun(n, __file__, "--one", json.dumps(run)), stdout=subprocess.PIPE, text=True)
            found = [json.loads(x[4:]) for x in done.stdout.splitlines() if x.startswith("ROW ")]
            if done.returncode or not found: print(f"d{depth} on {n} ranks failed", file=sys.stderr); continue
            rows += found
            if a.out: Path(a.out).open("a").write(json.dumps(found[0]) + "\n")
    table(rows)

if __name__ == "__main__": main()
