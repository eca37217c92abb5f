"Kernels where it does not read well as a cell: compiled, in two types, and eight bits under the rules of a GPU."
import pytest, torch, torch.nn.functional as F
from nanochat_nb import kernels, model
from nanochat_nb.kernels import fp8_linear, rotary_qkv
from nanochat_nb.model import GPT, GPTConfig, config_from_depth, rope_table
from nanochat_nb.settings import NanochatError

def naive_qkv(x, cos, sin, n_head):
    "Rotation and norm as chapter 02 writes them, in float64."
    n_kv, x = (x.size(2) - n_head) // 2, x.double()
    q, k, v = x.split((n_head, n_kv, n_kv), 2)
    turn = lambda t: F.rms_norm(t * cos + t.roll(t.size(-1) // 2, -1) * sin, (t.size(-1),), eps=1e-6)
    return turn(q), turn(k), v

@pytest.mark.parametrize("dtype,eps", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_way_back_of_rotary_qkv_for_eight_bits_is_the_same_way_back(dtype, eps, compiled):
    g = torch.Generator().manual_seed(0)
    cos, sin = (t[:, None] for t in rope_table(10, 16))
    x = torch.randn(3, 10, 4 + 2 * 2, 16, generator=g).to(dtype).requires_grad_()
    mix = [torch.randn(3, 10, n, 16, generator=g) for n in (4, 2, 2)]
    def run(f, *more):
        out = f(x, cos, sin, 4, *more)
        return *out, *torch.autograd.grad(sum((t * m).sum() for t, m in zip(out, mix)), x)
    torch.compiler.reset()
    ours = torch.compile(rotary_qkv, dynamic=False) if compiled else rotary_qkv
    plain, settled, naive = run(ours, False), run(ours, True), run(naive_qkv)
    for a, b, c in zip(plain, settled, naive):
        assert torch.equal(a, b)
        assert (b.double() - c.double()).norm() < eps * c.double().norm()

@pytest.fixture
def gpu_rules(monkeypatch):
    "The CPU multiplies any shape; a GPU wants sixteens in what it sums over and in what comes out."
    exact, shapes = torch._scaled_mm, []
    def strict(a, b, **kw):
        assert b.size(0) % 16 == 0 and b.size(1) % 16 == 0, f"{tuple(a.shape)} @ {tuple(b.shape)}: not multiples of 16"
        shapes.append((*a.shape, b.size(1)))
        return exact(a, b, **kw)
    try: exact(*(torch.zeros(16, 16).to(torch.float8_e4m3fn) for _ in "ab"), scale_a=torch.ones(()), scale_b=torch.ones(()), out_dtype=torch.bfloat16)
    except RuntimeError: pytest.skip("this build multiplies no eight-bit floats")
    monkeypatch.setattr(torch, "_scaled_mm", strict)
    return shapes

@pytest.mark.parametrize("m", [32, 96])                     # narrower than the input and wider
@pytest.mark.parametrize("n", [1, 20, 32])
def test_eight_bits_take_any_number_of_rows(gpu_rules, n, m):
    g = torch.Generator().manual_seed(0)
    x = F.rms_norm(torch.randn(n, 48, generator=g), (48,)).bfloat16().requires_grad_()
    w = (torch.randn(m, 48, generator=g) / 7).requires_grad_()
    to = torch.randn(n, m, generator=g)
    y, exact = fp8_linear(x, w.bfloat16(), 48**.5), x.float() @ w.T
    assert y.shape == exact.shape
    for a, b in zip((y, *torch.autograd.grad(y, (x, w), to.bfloat16())), (exact, *torch.autograd.grad(exact, (x, w), to))):
        assert a.shape == b.shape and (a - b).norm() < .1 * b.norm()
    assert len(gpu_rules) == 3

def test_the_slope_of_relu_square_is_read_off_eight_bits(gpu_rules):
    g = torch.Generator().manual_seed(0)
    h, w, to = torch.randn(40, 64, generator=g).bfloat16().requires_grad_(), (torch.randn(32, 64, generator=g) / 8).requires_grad_(), torch.randn(40, 32, generator=g)
    y, exact = fp8_linear(h, w.bfloat16(), 1792., square=True), h.float().relu().square() @ w.T
    for a, b in zip((y, *torch.autograd.grad(y, (h, w), to.bfloat16())), (exact, *torch.autograd.grad(exact, (h, w), to))):
        assert a.shape == b.shape and (a - b).norm() < .1 * b.norm()
    assert len(gpu_rules) == 3

def test_a_model_in_eight_bits_takes_any_number_of_rows_and_tokens(gpu_rules, monkeypatch):
    cfg = config_from_depth(2, 96, 13, "modern")
    m, g = GPT(cfg), torch.Generator().manual_seed(0)
    for p in m.parameters(): p.data.normal_(0, 1 if p is m.wte.weight else p.shape[1]**-.5, generator=g)
    x = torch.randint(0, 96, (3, 13), generator=g); y = x.roll(-1, 1); y[:, -1] = -1
    def run():
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16): loss = m(x, y, reduction="sum")
        loss.backward()
        return loss.item(), [p.grad for p in m.parameters()]
    want, grads = run()
    assert not gpu_rules
    m.use_fp8()
    got, low = run()
    assert gpu_rules and abs(got - want) < .02 * want
    for a, b in zip(grads, low): assert (a - b).norm() < .25 * a.norm()
    with m.rounded(), monkeypatch.context() as nobody:           # the same weights, converted beforehand
        for where in (kernels, model): nobody.setattr(where, "weights_fp8", None)
        shared, ready = run()
    assert shared == got and all(torch.equal(a, b) for a, b in zip(low, ready))
    m.head.weight.data.mul_(1.5)
    assert run()[0] != got                                       # outside nothing old is read

def test_widths_that_eight_bits_cannot_take_are_named():
    with pytest.raises(NanochatError, match="multiples of 16, not n_embd=40 and vocab_size=100;"): GPT(GPTConfig(1, 2, 2, 40, 100, 16)).use_fp8()
