"""Tokens a second of the engine: decoding at several batch sizes, next to transformers' `generate` on the same weights, and
a set of word problems answered together against one by one. Prints one table.

python bench/engine.py --depth 12 --device cuda
python bench/engine.py --depth 4 --vocab_size 1024 --seq_len 512 --device cpu --transformers --reference PATH --problems 50
python bench/engine.py --base FOLDER --batches "" --problems 100                   a trained model and the world's word problems"""
import argparse, os, statistics, sys, time
import torch
from nanochat_nb.engine import Engine
from nanochat_nb.evals import is_right, load_engine, world_of
from nanochat_nb.model import GPT, config_from_depth, count_params, to_hf
from nanochat_nb.runtime import init_runtime
from nanochat_nb.tokenizer import train_tokenizer
from nanochat_nb.world import World, documents, exam

class Sized:
    "A tokenizer of a small vocabulary in front of a model with a larger one; what it cannot say is left out."
    def __init__(self, tok, vocab_size): self.tok, self.vocab_size = tok, vocab_size
    def __getattr__(self, name): return getattr(self.tok, name)
    def decode(self, ids, **kw): return self.tok.decode([i for i in ids if i < self.tok.vocab_size], **kw)

def build(a, rt):
    "A random model: speed does not depend on what it says."
    text = documents(World())
    tok = train_tokenizer([next(text)["text"] for _ in range(300)], min(1024, a.vocab_size))
    model = GPT(config_from_depth(a.depth, a.vocab_size, a.seq_len)).to(rt.device)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.empty(p.shape).normal_(0, .05, generator=g))
    return Sized(tok, a.vocab_size), model

def timed(f, rt, repeat=3):
    "Median (wall seconds, processor seconds) of runs after one for warming up."
    f()
    out = []
    for _ in range(repeat):
        w, c = time.perf_counter(), time.process_time()
        f()
        if rt.device.type == "cuda": torch.cuda.synchronize()
        out.append((time.perf_counter() - w, time.process_time() - c))
    return statistics.median(w for w, _ in out), statistics.median(c for _, c in out)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--depth", type=int, default=12); ap.add_argument("--vocab_size", type=int, default=32768)
    ap.add_argument("--seq_len", type=int, default=2048); ap.add_argument("--device", default=""); ap.add_argument("--dtype", default="")
    ap.add_argument("--batches", default="1,16,128"); ap.add_argument("--prompt", type=int, default=16)
    ap.add_argument("--new", type=int, default=240); ap.add_argument("--eager", action="store_true", help="also without compiling")
    ap.add_argument("--int8", action="store_true"); ap.add_argument("--transformers", action="store_true")
    ap.add_argument("--reference", default="", help="a checkout of karpathy/nanochat: its engine, on a model of its own of the same shape")
    ap.add_argument("--problems", type=int, default=0, help="answers in the one-by-one comparison; the batch answers 1,000")
    ap.add_argument("--base", default="", help="base folder of a run on the mini world: its fine-tuned model instead of a random one")
    a = ap.parse_args()
    rt = init_runtime(a.device, a.dtype)
    if a.base:
        e = load_engine(a.base, "sft", runtime=rt)
        tok, model, a.depth, a.vocab_size = e.tok, e.model, e.model.cfg.n_layer, e.tok.vocab_size
    else: tok, model = build(a, rt)
    cuda = rt.device.type == "cuda"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else f'CPU, {torch.get_num_threads()} thread(s)'}, {rt.dtype}; "
          f"d{a.depth}, vocabulary {a.vocab_size:,}, {count_params(model.cfg)['total']:,} parameters; prompt {a.prompt}, {a.new} new tokens\n")
    print("| what | batch | sampling | tok/s | ms a step | tok/s of processor time |\n|---|---|---|---|---|---|")
    def row(what, B, how, f, n):
        w, c = timed(f, rt)
        print(f"| {what} | {B} | {how} | {n / w:,.0f} | {1000 * w * B / n:.2f} | {n / c:,.0f} |", flush=True)
    engines = [("compiled", dict(compile=True))] + [("eager", {})] * a.eager + [("compiled, int8", dict(compile=True, int8=True))] * a.int8
    ways = [("greedy", dict(temperature=0)), ("T = 1", dict(temperature=1.)), ("top-k 50", dict(temperature=1., top_k=50))]
    for what, kw in engines:
        e = Engine(model, tok, rt, **kw)
        for B in map(int, filter(None, a.batches.split(","))):
            x = torch.randint(0, 900, (B, a.prompt), generator=torch.Generator().manual_seed(B)).tolist()
            for how, opts in ways if cuda or B == 1 else ways[:1]:
                row(what, B, how, lambda: e.generate(x, a.new, stop=(), tools=False, batch_size=B, **opts), B * a.new)
            e.idle = {}
    if a.transformers:
        from transformers import NanoChatConfig, NanoChatForCausalLM
        state, cfg = to_hf(model)
        hf = NanoChatForCausalLM(NanoChatConfig(**cfg)).to(rt.device)
        hf.load_state_dict(state); hf.eval()
        hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = None, 0
        for B in map(int, filter(None, a.batches.split(","))):
            x = torch.randint(0, 900, (B, a.prompt), generator=torch.Generator().manual_seed(B)).to(rt.device)
            def f():
                with torch.no_grad(), rt.autocast(): hf.generate(x, max_new_tokens=a.new, min_new_tokens=a.new, do_sample=False)
            row("transformers", B, "greedy", f, B * a.new)
    if a.reference: reference(a, rt, row)
    if a.problems: problems(a, rt, model, tok, row)

class NoSpecial:
    "What the reference's engine asks of a tokenizer; no token is special, so every row runs to its end."
    def encode_special(self, name): return -1
    def get_bos_token_id(self): return -1

def reference(a, rt, row):
    "Its engine, as it comes: float32 on a CPU, one prompt for all rows (it needs rustbpe to import)."
    sys.path.insert(0, a.reference)
    from nanochat.engine import Engine as Theirs
    from nanochat.gpt import GPT as TheirGPT, GPTConfig as TheirConfig
    cfg = config_from_depth(a.depth, a.vocab_size, a.seq_len)
    with torch.device("meta"): model = TheirGPT(TheirConfig(a.seq_len, a.vocab_size, a.depth, cfg.n_head, cfg.n_head, cfg.n_embd, "L"))
    model.to_empty(device=rt.device); model.init_weights(); model.eval()
    e = Theirs(model, NoSpecial())
    for B in map(int, filter(None, a.batches.split(","))):
        x = torch.randint(0, 900, (a.prompt,), generator=torch.Generator().manual_seed(B)).tolist()
        row("reference", B, "greedy", lambda: [None for _ in e.generate(x, B, a.new, 0.0)], B * a.new)

def problems(a, rt, model, tok, row):
    "Prompts as long as GSM8K's and answers of many lengths, or the world's problems: 1,000 together, some of them one by one."
    g, world = torch.Generator().manual_seed(1), world_of(a.base) if a.base else None
    items = [x for l in ("zh", "en") for x in exam(world, l, "arithmetic", 500)] if a.base else []
    items = [items[i] for i in torch.randperm(len(items), generator=g)]
    sizes = torch.randint(40, 140, (1000,), generator=g).tolist()
    prompts = [tok.render_prompt(x["messages"]) for x in items] or [torch.randint(0, 900, (n,), generator=g).tolist() for n in sizes]
    limits = [200] * len(items) or torch.randint(30, 200, (1000,), generator=g).tolist()
    B = 128 if rt.device.type == "cuda" else 64
    def answer(e, n, rows):
        todo = e.requests(prompts[:n], 200, temperature=0, **({} if items else dict(stop=(), tools=False)))
        for q, m in zip(todo, limits): q.max_tokens = m
        for _ in e.drain(todo, rows): pass
        return [q.out for q in todo]
    kept = {}
    for what, n, rows in (("problems, one by one", a.problems, 1), ("problems, together", len(prompts), B)):
        e = Engine(model, tok, rt, compile=True)
        kept[what] = answer(e, n, rows)
        row(what, rows, "greedy", lambda: answer(e, n, rows), sum(map(len, kept[what])))
    one, many = kept.values()
    print(f"\nthe same answers: {sum(x == y for x, y in zip(one, many))} of {len(one)}")
    if items:
        for what, out in kept.items():
            right = sum(is_right(tok.decode(o), x["answer"]) for o, x in zip(out, items))
            print(f"{what}: {right} of {len(out)} right")

if __name__ == "__main__": main()
