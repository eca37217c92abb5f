"""Several ranks of one host: speed, exposed communication and memory at 1, 2, 4, 8 ranks, and a run whose number of ranks changes.

python bench/scaling.py [--ranks 1 2 4 8] [--depths 12 20] [--steps 12] [--out FILE.jsonl]          the table
python bench/scaling.py --elastic SOURCE [--ranks 8] [--steps 200]                                  N → N/2 → N by resume, then a killed rank

Every row is a torchrun of its own with random tokens, 524,288 a step for each row's ranks together (weak scaling in rows: each rank keeps its
micro-batch, steps get larger with `--weak`). Exposed communication is time in which a GPU runs communication kernels and nothing else, from a
trace of one step. Efficiency is against the smallest number of ranks in the table. `--device cpu` tries the script without a GPU (gloo).
"""
import argparse, json, os, signal, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
    "Exposed and whole communication of one step; None without a GPU."
    import torch
    if not torch.cuda.is_available(): step(); return None, None
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as prof: step(); torch.cuda.synchronize()
    rows = [(e.time_range.start, e.time_range.end, "nccl" in e.name.lower()) for e in prof.events() if e.device_type.name == "CUDA"]
    return exposed_ms(rows)

def rank(run):
    "One rank: the steps of pretraining on random tokens."
    import torch
    from nanochat_nb.model import GPT, config_from_depth
    from nanochat_nb.pretrain import PretrainSettings, Trainer, fill
    from nanochat_nb.runtime import all_reduce_mean, close_runtime, init_runtime, peak_flops
    rt, T, vocab = init_runtime(run["device"], "", 0), run["seq_len"], run["vocab"]
    batch = run["batch"] * (rt.world_size if run["weak"] else 1)
    cfg = fill(PretrainSettings(depth=run["depth"], batch_tokens=batch, seq_len=T, num_iterations=1000, fp8=run["fp8"], compile=run["device"] == "cuda"))
    model = GPT(config_from_depth(run["depth"], vocab, T, run["arch"])).to(rt.device).init_weights(0)
    x = torch.randint(0, vocab, (batch // T // rt.world_size, T), generator=torch.Generator().manual_seed(rt.rank))
    class Same:
        def __next__(self): return x, x.roll(-1, 1)
        def __iter__(self): return self
        def state_dict(self): return {}
        def load_state_dict(self, state): pass
    t = Trainer(cfg, rt, None, model, Same(), Path("."), 1000, min(cfg.device_batch, len(x)), batch)
    t.peak, fast, at = peak_flops(rt), t.fast_model(), iter(range(1000))
    began = time.time(); t.train_step(fast, next(at)); first = time.time() - began
    rows = [t.train_step(fast, next(at)) for _ in range(run["steps"])]
    alone, comm = traced(lambda: t.train_step(fast, next(at)))
    held = sum(v.numel() * v.element_size() for s in t.opt.state.values() for v in s.values())
    value = torch.tensor([statistics.median(r["tok_per_s"] for r in rows), statistics.median(r["loader_ms"] for r in rows)], device=rt.device)
    all_reduce_mean([value])
    if rt.is_main: print("ROW " + json.dumps(dict(run, tok_per_s=round(value[0].item()), loader_ms=round(value[1].item(), 2), tokens_a_step=batch,
        first_step_s=round(first, 1), exposed_ms=alone, communication_ms=comm, step_ms=round(statistics.median(r["step_ms"] for r in rows), 1),
        memory_gb=round((rows[-1]["mem"] or 0) / 1e9, 2), optimizer_gb=round(held / 1e9, 3), loss=rows[-1]["loss"])), flush=True)
    close_runtime()

def torchrun(n, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *map(str, args)]

def table(rows):
    print("| run | ranks | tokens/s | efficiency | step ms | exposed communication ms | share of the step | memory GB a rank | optimiser GB a rank | loader ms | first step s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        least = min((x for x in rows if x["depth"] == r["depth"]), key=lambda x: x["ranks"])
        eff = r["tok_per_s"] / r["ranks"] / (least["tok_per_s"] / least["ranks"])
        alone = "–" if r["exposed_ms"] is None else f"{r['exposed_ms']:.1f}"
        part = "–" if r["exposed_ms"] is None else f"{r['exposed_ms'] / r['step_ms']:.1%}"
        print(f"| d{r['depth']} | {r['ranks']} | {r['tok_per_s']:,} | {eff:.1%} | {r['step_ms']} | {alone} | {part} | {r['memory_gb']} | {r['optimizer_gb']} | {r['loader_ms']} | {r['first_step_s']} |")

def elastic(a):
    "Losses of N → N/2 → N ranks by resume against an undisturbed run, and of a run that loses a rank."
    from nanochat_nb.runtime import read_metrics
    n, steps, losses = a.ranks[-1], a.steps, {}
    common = ["--source", a.elastic, "--depth", a.depths[0], "--eval_every", steps, "--save_every", max(1, steps // 8), "--keep", 0, "--seed", 1]
    common += ["--seq_len", a.seq_len, "--batch_tokens", a.batch] if a.device == "cpu" else []
    with tempfile.TemporaryDirectory() as tmp:
        def go(base, ranks, until, *more, kill=False):
            env = os.environ | {"NANOCHAT_BASE_DIR": f"{tmp}/{base}"}
            p = subprocess.Popen(torchrun(ranks, *(["--max_restarts", 1] if kill else []), "-m", "nanochat_nb.pretrain", *common, "--num_iterations", steps, *more), env=env)
            path = Path(tmp) / base / "base_checkpoints" / f"d{a.depths[0]}" / "metrics.jsonl"
            rows = lambda: [r for r in read_metrics(path) if "loss" in r] if path.exists() else []
            while p.poll() is None and until < steps and len(rows()) < until: time.sleep(1)
            if kill:
                victim = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()[-1]
                os.kill(int(victim), signal.SIGKILL)
            elif p.poll() is None and until < steps: p.send_signal(signal.SIGTERM)
            p.wait()
            return [r["loss"] for r in rows()]
        losses["undisturbed"] = go("a", n, steps)
        go("b", n, steps // 3); go("b", max(1, n // 2), 2 * steps // 3, "--resume"); losses["N, N/2, N"] = go("b", n, steps, "--resume")
        losses["a rank killed"] = go("c", n, steps // 2, kill=True)
    print("| run | steps | largest difference of a loss | last loss |\n|---|---|---|---|")
    for name, x in losses.items():
        worst = max(abs(p - q) for p, q in zip(x, losses["undisturbed"], strict=True))
        print(f"| {name} | {len(x)} | {worst:.2g} | {x[-1]:.4f} |")

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8]); ap.add_argument("--depths", type=int, nargs="*", default=[12, 20])
    ap.add_argument("--steps", type=int, default=12); ap.add_argument("--batch", type=int, default=524288); ap.add_argument("--seq_len", type=int, default=2048)
    ap.add_argument("--vocab", type=int, default=32768); ap.add_argument("--arch", default="modern"); ap.add_argument("--fp8", action="store_true")
    ap.add_argument("--weak", action="store_true"); ap.add_argument("--device", default="cuda"); ap.add_argument("--out", default="")
    ap.add_argument("--elastic", default="", metavar="SOURCE"); ap.add_argument("--one")
    a = ap.parse_args()
    if a.one: return rank(json.loads(a.one))
    if a.elastic: return elastic(a)
    rows = []
    for depth in a.depths:
        for n in a.ranks:
            run = dict(depth=depth, ranks=n, **{k: getattr(a, k) for k in ("steps", "batch", "seq_len", "vocab", "arch", "fp8", "weak", "device")})
            done = subprocess.run(torchrun(n, __file__, "--one", json.dumps(run)), stdout=subprocess.PIPE, text=True)
            found = [json.loads(x[4:]) for x in done.stdout.splitlines() if x.startswith("ROW ")]
            if done.returncode or not found: print(f"d{depth} on {n} ranks failed", file=sys.stderr); continue
            rows += found
            if a.out: Path(a.out).open("a").write(json.dumps(found[0]) + "\n")
    table(rows)

if __name__ == "__main__": main()
