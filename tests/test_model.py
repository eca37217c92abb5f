"What of the model does not read well as a notebook cell: the command, compilation, generation against transformers."
import dataclasses, json, subprocess, sys
import pytest, torch
from nanochat_nb.model import GPT, GPTConfig, KVCache, config_from_depth, flops_per_token, to_hf

def random_model(cfg, seed=0):
    "A model none of whose parts is silent."
    m, g = GPT(cfg), torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.data.normal_(0, 1 if p is m.wte.weight else p.shape[1]**-.5, generator=g)
    return m

def command(*flags):
    return subprocess.run([sys.executable, "-m", "nanochat_nb.model", *flags], capture_output=True, text=True)

@pytest.mark.parametrize("depth,params,flops,steps", [(10, 133038080, "7.038566e+08", 5075),
    (20, 560988160, "3.491758e+09", 21400), (32, 1879048192, "1.207960e+10", 71680)])
def test_command_prints_one_json_object_last(depth, params, flops, steps):
    r = command("--depth", str(depth), "--vocab_size", "65536", "--arch", "classic")
    out = json.loads(r.stdout.splitlines()[-1])
    assert (r.returncode, out["params"], f"{out['flops_per_token']:.6e}", out["steps"]) == (0, params, flops, steps)
    assert out["depth"] == out["n_layer"] == depth and out["n_embd"] == 64 * depth and out["tokens"] == 20 * params
    assert out["memory_total"] == sum(v for k, v in out.items() if k.startswith("memory_") and k != "memory_total")

@pytest.mark.parametrize("flags,says", [(("--depth", "0"), "depth=0"), (("--depth", "-3"), "depth=-3"),
    (("--arch", "clasic"), "did you mean 'classic'"), (("--dpeth", "4"), "did you mean 'depth'"),
    (("--vocab_size", "0"), "vocab_size=0"), (("--depth", "12", "--n_kv_head", "4"), "must divide n_head=6"),
    (("--batch_tokens", "0"), "batch_tokens=0")])
def test_command_refuses_bad_input_in_one_line(flags, says):
    r = command(*flags)
    assert r.returncode == 2 and r.stdout == "" and says in r.stderr and r.stderr.count("\n") == 1

def loss_and_grads(f, m, x, y):
    m.zero_grad()
    loss = f(x, y); loss.backward()
    return loss.item(), [p.grad.clone() for p in m.parameters()]

def test_compiled_agrees_with_eager_in_bfloat16_and_in_slices():
    m = random_model(GPTConfig(1, 2, 1, 32, 64, 16))
    x = torch.randint(0, 64, (4, 16)); y = x.roll(-1, 1); y[:, -1] = -1
    want, grads = loss_and_grads(m, m, x, y)
    with torch.autocast("cpu", torch.bfloat16): low, g = loss_and_grads(torch.compile(m), m, x, y)
    assert abs(low - want) < 2e-2
    for a, b in zip(grads, g): assert b.dtype == torch.float32 and (a - b).norm() < 5e-2 * a.norm()
    m.loss_chunk = 40 * 64                                       # two slices, the last one short
    got, g = loss_and_grads(torch.compile(m), m, x, y)
    assert abs(got - want) < 1e-5
    for a, b in zip(grads, g): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

def test_what_is_looked_up_is_not_kept_when_compiled():
    m, x, kept = random_model(GPTConfig(1, 2, 2, 64, 64, 32)), torch.randint(0, 64, (4, 32)), []
    f = torch.compile(m.embed, backend="aot_eager_decomp_partition", dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = f(x)
    assert torch.equal(y, torch.nn.functional.rms_norm(m.wte(x).bfloat16(), (64,), eps=1e-6).bfloat16())
    assert 0 < sum(t.nbytes for t in kept if t.data_ptr() != m.wte.weight.data_ptr()) < y.nbytes

@torch.no_grad()
def test_greedy_generation_equals_transformers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    m = random_model(GPTConfig(2, 4, 2, 64, 100, 48))
    weights, config = to_hf(m)
    hf = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**config, eos_token_id=None, pad_token_id=0)).eval()
    hf.load_state_dict(weights)
    prompt = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    want = hf.generate(prompt, max_new_tokens=20, do_sample=False)
    cache, new, out = KVCache(m.cfg, 2, 48), prompt, [prompt]
    for _ in range(20):
        new = m(new, cache=cache)[:, -1:].argmax(-1)
        out.append(new)
    assert torch.equal(torch.cat(out, 1), want)

@torch.no_grad()
def test_ragged_cache_in_bfloat16():
    m = random_model(GPTConfig(2, 2, 1, 32, 50, 32))
    x, lengths = torch.randint(0, 50, (2, 12)), [4, 7]
    with torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(m.cfg, 2, 32, dtype=torch.bfloat16)
        m(x[:, :7], cache=cache); cache.lengths = lengths
        for t in range(3):
            got = m(torch.stack([x[i, n + t] for i, n in enumerate(lengths)])[:, None], cache=cache)
            for i, n in enumerate(lengths):
                torch.testing.assert_close(got[i, 0], m(x[i:i+1, :n + t + 1])[0, -1], atol=.15, rtol=0)

def test_every_depth_has_even_heads_of_at_most_128_and_counts_are_exact():
    for depth in range(1, 65):
        c = config_from_depth(depth, 1000)
        assert c.n_embd == 64 * depth and c.n_head * c.head_dim == c.n_embd and 64 <= c.head_dim <= 128 and c.head_dim % 2 == 0

def test_which_layers_see_all_and_which_have_tables():
    for depth in range(1, 14):
        c = config_from_depth(depth, 64, 2048, "modern")
        assert [i for i in range(depth) if not c.layer_chunk(i)] == sorted({*range(3, depth, 4), depth - 1})
        assert [i for i in range(depth) if c.has_values(i)] == [*range(depth)][::-1][::2][::-1]

def test_a_stretch_longer_than_the_row_costs_no_more_than_the_row():
    short = config_from_depth(4, 1024, 256, "modern")
    assert short.chunk > 256 and flops_per_token(short) == flops_per_token(dataclasses.replace(short, chunk=256)) == flops_per_token(dataclasses.replace(short, chunk=0))
