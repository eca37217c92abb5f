"""Speed of a training step, this project and the reference side by side on one GPU: one table, one JSON row a run.

python bench/train.py --reference PATH [--runs NAME …] [--out FILE.jsonl]
python bench/train.py --reference PATH --runs ref-d6-cpu modern-d6-cpu           4,096 tokens a step on a CPU, by clock alone

PATH is a checkout of karpathy/nanochat. Every run is a process of its own with the same random tokens: 524,288 a step in
micro-batches, forward, backward and optimiser. Rates are medians of the timed steps; kinds of time come from a trace of one.
With `--together` all runs compile side by side, and when the last has, they are timed one after the other: less time on a
machine that is lent, but a first step that other runs slowed down.
"""
import argparse, atexit, contextlib, fcntl, functools, json, os, resource, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = {  # name: who, depth, vocabulary, rows of a micro-batch, and what else differs
    "ref-d12": dict(who="reference", depth=12, vocab=32768, rows=32, pattern="L"),
    "ref-d20": dict(who="reference", depth=20, vocab=32768, rows=16, pattern="L"),
    "classic-d12": dict(who="ours", depth=12, vocab=32768, rows=32, arch="classic"),
    "modern-d12": dict(who="ours", depth=12, vocab=32768, rows=32, arch="modern"),
    "modern-fp8-d12": dict(who="ours", depth=12, vocab=32768, rows=32, arch="modern", fp8=True),
    "modern-tune-d12": dict(who="ours", depth=12, vocab=32768, rows=32, arch="modern", env={"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}),
    "ref-64rows-d12": dict(who="reference", depth=12, vocab=32768, rows=64, pattern="L"),
    "modern-fp8-64rows-d12": dict(who="ours", depth=12, vocab=32768, rows=64, arch="modern", fp8=True),
    "modern-fp8-lean-d12": dict(who="ours", depth=12, vocab=32768, rows=32, arch="modern", fp8=True, budget=0.3),
    "classic-d20": dict(who="ours", depth=20, vocab=32768, rows=16, arch="classic"),
    "modern-d20": dict(who="ours", depth=20, vocab=32768, rows=16, arch="modern"),
    "modern-fp8-d20": dict(who="ours", depth=20, vocab=32768, rows=16, arch="modern", fp8=True),
    "ref-d6-cpu": dict(who="reference", depth=6, vocab=32768, rows=8, pattern="L", device="cpu", T=512, batch=4096),
    "modern-d6-cpu": dict(who="ours", depth=6, vocab=32768, rows=8, arch="modern", device="cpu", T=512, batch=4096),
}
GPU = dict(device="cuda", T=2048, batch=524288)  # where a run says nothing else
KINDS = (("attention", ("flash", "fmha", "sdpa", "flex", "cudnn_generated", "attention")),
         ("products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "wgmma", "splitk")),
         ("loss", ("logsumexp", "loss", "softmax", "tanh", "_exp_")))


def tokens(run):
    import torch
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, run["vocab"], (run["batch"] // run["T"], run["T"]), generator=g)

def ours(run):
    "(step function, FLOPs a token, parameters) of this project."
    import torch
    from nanochat_nb.model import GPT, config_from_depth, count_params, flops_per_token
    from nanochat_nb.pretrain import PretrainSettings, Trainer, fill
    from nanochat_nb.runtime import init_runtime, peak_flops
    rt = init_runtime(run["device"], "bfloat16" if run["device"] == "cuda" else "", 0)
    cfg = fill(PretrainSettings(depth=run["depth"], fp8=run.get("fp8", False),
                                activation_budget=run.get("budget", 1.0), muon_beta2=0.9 if run["arch"] == "modern" else 0.0))
    shape = config_from_depth(run["depth"], run["vocab"], run["T"], run["arch"])
    model, x = GPT(shape).to(rt.device), tokens(run)
    class Same:
        def __next__(self): return x, x.roll(-1, 1)
        def __iter__(self): return self
        def state_dict(self): return {}
        def load_state_dict(self, state): pass
    trainer = Trainer(cfg, rt, None, model, Same(), Path("."), 1000, run["rows"], run["batch"])
    trainer.peak, fast, at = peak_flops(rt), functools.cache(trainer.fast_model), iter(range(1000))
    return lambda: trainer.train_step(fast(), next(at))["loss"], flops_per_token(shape), count_params(shape)["total"], trainer.peak

def reference(run):
    "The same of the reference: its model, its optimiser, its order of work."
    import torch
    sys.path.insert(0, run["path"])
    from nanochat.gpt import GPT, GPTConfig
    from nanochat_nb.runtime import init_runtime, peak_flops
    rt = init_runtime(run["device"], "bfloat16" if run["device"] == "cuda" else "", 0)
    heads = run["depth"] * 64 // 128
    with torch.device("meta"):
        model = GPT(GPTConfig(run["T"], run["vocab"], run["depth"], heads, heads, heads * 128, run["pattern"]))
    model.to_empty(device=rt.device); model.init_weights()
    opt, fast, x = model.setup_optimizer(), torch.compile(model, dynamic=False), tokens(run)
    def step():
        a = x.to(rt.device); b = a.roll(-1, 1)
        parts = list(zip(a.split(run["rows"]), b.split(run["rows"])))
        for i, o in parts:
            loss = fast(i, o)
            (loss / len(parts)).backward()
        opt.step(); model.zero_grad(set_to_none=True)
        return loss.item()
    return step, model.estimate_flops(), sum(p.numel() for p in model.parameters()), peak_flops(rt)

def kinds_of_time(step):
    "Milliseconds of GPU time of one step by kind of kernel, and the ten largest kernels."
    import torch
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as prof: step(); torch.cuda.synchronize()
    out, top = {}, []
    for e in prof.key_averages():
        ms, name = e.self_device_time_total / 1000, e.key.lower()
        if not ms: continue
        kind = next((k for k, words in KINDS if any(w in name for w in words)), "other")
        out[kind] = out.get(kind, 0) + ms
        top.append((round(ms, 2), e.count, e.key[:90]))
    return {k: round(v, 1) for k, v in out.items()}, sorted(top, reverse=True)[:14]

@contextlib.contextmanager
def locked(how):
    "Compiling shares the lock, timing wants it alone: so nobody is timed while anybody compiles."
    with open(Path(tempfile.gettempdir()) / "bench_train.lock", "w") as f:
        fcntl.flock(f, how)
        yield

def one(run):
    import torch
    gpu = run["device"] == "cuda"
    sync = torch.cuda.synchronize if gpu else lambda: None
    with locked(fcntl.LOCK_SH):
        step, flops, params, peak = (ours if run["who"] == "ours" else reference)(run)
        sync(); ready = time.time()
        step(); sync()
        first, whole = time.time() - ready, time.time() - run.pop("began")
    seconds = []
    with locked(fcntl.LOCK_EX):
        step(); sync()
        for _ in range(run["steps"]):
            t = time.perf_counter(); loss = step(); sync(); seconds.append(time.perf_counter() - t)
        kinds, top = kinds_of_time(step) if gpu else ({}, [])
    rate = run["batch"] / statistics.median(seconds)
    mem = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for t in top: print(*t, file=sys.stderr)
    micro = run["batch"] // run["T"] // run["rows"]
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps(dict(run, gpu=where, tok_per_s=round(rate), mfu=round(rate * flops / 989e12, 4), of_measured_peak=round(rate * flops / peak, 4),
                          params=params, memory_gb=round(mem / 1e9, 1), first_step_s=round(first, 1), start_and_first_step_s=round(whole, 1), loss=round(loss, 3),
                          ms_per_micro=round(1000 * statistics.median(seconds) / micro, 1),
                          kinds={k: round(v / micro, 1) for k, v in kinds.items()})))

def table(rows):
    print("| run | parameters | tokens/s | MFU of 989 TFLOP/s | memory GB | first step s | and what goes before it s | ms a micro-batch: whole | products | attention | loss | other |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        k = r["kinds"]
        print(f"| {r['name']} | {r['params'] / 1e6:.0f}M | {r['tok_per_s']:,} | {'–' if r.get('device') == 'cpu' else format(r['mfu'], '.1%')} | {r['memory_gb']} | {r['first_step_s']} | {r['start_and_first_step_s']} | {r['ms_per_micro']} | "
              + " | ".join(str(k.get(n, 0) if k else "–") for n in ("products", "attention", "loss", "other")) + " |")

def finish(a, rows, name, process):
    "Wait for a run and add its row."
    out, err = process.communicate()
    print(f"--- {name}\n{err[-2600:]}", file=sys.stderr, flush=True)
    if process.returncode: return
    rows.append({k: v for k, v in json.loads(out.splitlines()[-1]).items() if k != "path"})
    if a.out: Path(a.out).open("a").write(json.dumps(rows[-1]) + "\n")

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--reference", default=""); ap.add_argument("--runs", nargs="*", default=[n for n in RUNS if "cpu" not in n]); ap.add_argument("--steps", type=int, default=8)
    ap.add_argument("--out", default=""); ap.add_argument("--one"); ap.add_argument("--together", action="store_true")
    a = ap.parse_args()
    if a.one: return one(json.loads(a.one))
    rows, todo, cache = [], [], tempfile.mkdtemp()      # a cache of compiled code for each run, empty at first
    atexit.register(shutil.rmtree, cache, True)
    for name in a.runs:
        run = dict(GPU | RUNS[name], name=name, path=a.reference, began=time.time(), steps=a.steps if RUNS[name]["depth"] < 16 else max(3, a.steps // 2))
        if run["who"] == "reference" and not a.reference: continue
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/{name}"} | run.get("env", {})
        todo.append((name, subprocess.Popen([sys.executable, __file__, "--one", json.dumps(run)], text=True, stdout=subprocess.PIPE,
                                            stderr=subprocess.PIPE, env=env)))
        if not a.together: finish(a, rows, *todo.pop())
    for name, process in todo: finish(a, rows, name, process)
    table(rows)

if __name__ == "__main__": main()
