"Muon and AdamW: odd matrices, missing gradients, saved state, any request for a batch."
import copy, math
import pytest, torch
from torch import nn, tensor
from safetensors.torch import load, save
from nanochat_nb.model import GPT, config_from_depth
from nanochat_nb.optim import *
from nanochat_nb.settings import NanochatError

f32 = dict(dtype=torch.float32)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_never_explodes(dtype):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(40, 40))[0] for _ in "UV")
    spread = U @ torch.diag(torch.logspace(0, -4, 40)) @ V.T
    for G in (torch.eye(40), torch.ones(40, 24), torch.randn(64, 16), torch.randn(16, 64), spread, 1e8 * spread):
        s = torch.linalg.svdvals(orthogonalize(G, dtype=dtype))
        assert 0.65 < s.max() < 1.2
    assert not orthogonalize(torch.zeros(2, 3, 5), dtype=dtype).any()

def test_orthogonalize_keeps_shape_and_dtype():
    for shape in ((3, 5), (2, 5, 3), (2, 2, 4, 4)):
        G = torch.randn(shape, dtype=torch.float64)
        assert orthogonalize(G).shape == G.shape and orthogonalize(G).dtype == G.dtype

def test_missing_gradients():
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    opt = Muon([p, q])
    opt.step()
    assert p.eq(1).all() and not opt.state_dict()["state"]
    p.grad = torch.eye(4)
    opt.step()
    assert q.eq(1).all() and not p.eq(1).all()
    assert opt.step(lambda: 3.) == 3.
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    b.grad = torch.ones(3)
    MuonAdamW([adamw_group([a, b])]).step()
    assert a.eq(1).all() and not b.eq(1).all()

def test_cautious_decay_by_hand():
    w = nn.Parameter(tensor([[2., -2.], [2., 2.]]))
    w.grad, start = tensor([[1., 1.], [1., -1.]]), w.detach().clone()  # orthogonal up to its scale
    Muon([w], lr=.1, weight_decay=.5, coefficients=polar_express(8), **f32).step()
    moved = .1 * (w.grad / math.sqrt(2) + tensor([[1., 0.], [1., 0.]]))  # only the left column shrinks by its update
    torch.testing.assert_close(start - w.detach(), moved, atol=1e-4, rtol=0)

def make(seed=0):
    model = GPT(config_from_depth(2, 64, 16))
    return model, make_optimizer(model, weight_decay=.1, dtype=torch.float32)

def go(model, opt, steps):
    out = []
    for i in steps:
        set_schedule(opt, i, 8, warmup=.2)
        x = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(i))
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward(); opt.step(); opt.zero_grad()
        out.append(loss.item())
    return out

def test_state_survives_safetensors_exactly():
    whole = go(*make(), range(8))
    model, opt = make()
    first = go(model, opt, range(5))
    sd = copy.deepcopy(opt.state_dict())
    blob = save({f"{i}.{k}": v for i, s in sd["state"].items() for k, v in s.items()})
    weights, state = copy.deepcopy(model.state_dict()), {}
    for k, v in load(blob).items(): state.setdefault(int(k.split(".")[0]), {})[k.split(".")[1]] = v
    model, opt = make()
    model.load_state_dict(weights); opt.load_state_dict(dict(state=state, param_groups=sd["param_groups"]))
    assert first + go(model, opt, range(5, 8)) == whole

def test_averaged_gradients_of_two_halves_are_one_batch():
    "What two ranks do: each its half of the rows, gradients averaged, the same update everywhere."
    x = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    (a, oa), (b, ob) = make(), make()
    oa.orthogonalize.keywords.update(f32); ob.orthogonalize.keywords.update(f32)
    for _ in range(3):
        a(x[:, :-1], x[:, 1:]).backward()
        for half in x.chunk(2): (b(half[:, :-1], half[:, 1:]) / 2).backward()
        for o in (oa, ob): o.step(); o.zero_grad()
    x, y = x[:, :-1], x[:, 1:]
    assert abs(a(x, y).item() - b(x, y).item()) < 1e-3

def test_groups():
    model = GPT(config_from_depth(2, 64, 16))
    model.wte.weight.requires_grad_(False)
    opt, frozen = make_optimizer(model), model.wte.weight.clone()
    go(model, opt, range(2))
    assert len(opt.param_groups) == 4 and model.wte.weight.equal(frozen)  # what does not train has no group
    opt = make_optimizer(GPT(config_from_depth(12, 64, 16)), lr_scale=.5)
    assert [g["initial_lr"] for g in opt.param_groups] == pytest.approx([.002, .1, .01, .01, .01])

def test_momentum_schedule():
    assert [muon_momentum(s) for s in (0, 150, 300, 9999)] == pytest.approx([.85, .9, .95, .95])
    opt = make()[1]
    set_schedule(opt, 6, 8, warmdown=.5, final=.2)
    g = opt.param_groups[-1]
    assert g["lr"] == pytest.approx(.02 * (.5 + .5 * .2)) and g["weight_decay"] == pytest.approx(.1 * 2 / 8)

def test_the_schedule_of_a_step_owes_nothing_to_the_steps_before():
    a, b = make()[1], make()[1]
    for step in range(7): set_schedule(a, step, 8, warmup=.2)
    set_schedule(b, 6, 8, warmup=.2)
    for g, h in zip(a.param_groups, b.param_groups, strict=True):
        for k in ("lr", "weight_decay", "momentum"): assert g.get(k) == h.get(k), k
    assert b.param_groups[-1]["weight_decay"] == pytest.approx(.1 * 2 / 8)

def test_every_part_has_its_rate_and_matrices_alone_decay():
    model = GPT(config_from_depth(3, 64, 16, "modern"))                     # 192 wide: AdamW's rates are doubled
    opt = make_optimizer(model, weight_decay=.1)
    of = {id(p): g for g in opt.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        part, g = name.split(".")[0], of[id(p)]
        rate = dict(head=.008, wte=.4, values=.2, mix=.04).get(part, .02)
        assert (g["initial_lr"], g["weight_decay"]) == (pytest.approx(rate), .1 * (part == "blocks")), name

def test_any_request_gives_a_batch_that_splits():
    g = torch.Generator().manual_seed(0)
    for _ in range(500):
        rows, n_gpu, most = (int(torch.randint(1, hi, (), generator=g)) for hi in (600, 17, 65))
        p = plan(4, seq_len=64, batch_tokens=rows * 64, n_gpu=n_gpu, device_batch=most)
        assert p.batch_tokens == n_gpu * p.device_batch * p.accumulation * 64
        assert 1 <= p.device_batch <= most and p.tokens == p.steps * p.batch_tokens
        assert abs(p.batch_tokens - rows * 64) / 64 <= max(n_gpu, .1 * rows)
        assert (p.batch_tokens != rows * 64) == any("batch_tokens" in n for n in p.notes)

def test_plan_options():
    assert plan(20).notes == [] and plan(4, num_iterations=30).steps == 30
    for d in (4, 12, 20): assert plan(d, arch="modern").steps == plan(d).steps      # tables of values ask for no text
    for bad in (dict(depth=0), dict(depth=4, ratio=0.), dict(depth=4, device_batch=0), dict(depth=4, seq_len=0)):
        with pytest.raises(NanochatError, match=min(bad, key=bad.get)): plan(**bad)

def _ranks(rank, world, folder):
    "One of several ranks: three steps on its share of the rows, the state saved whole, loaded, two more steps."
    import torch.distributed as dist
    from nanochat_nb.runtime import close_runtime
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    model, opt = make()
    def steps(which):
        for i in which:
            set_schedule(opt, i, 8)
            x = torch.randint(64, (12, 17), generator=torch.Generator().manual_seed(i))[rank::world]
            model(x[:, :-1], x[:, 1:]).backward(); opt.step(); opt.zero_grad()
    steps(range(3))
    state = opt.state_dict()
    held = sum(v.numel() for s in opt.state.values() for v in s.values())
    sent = [copy.deepcopy(state)]
    dist.broadcast_object_list(sent)
    opt = make_optimizer(model, weight_decay=.1, dtype=torch.float32)
    opt.load_state_dict(sent[0])
    steps(range(3, 5))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyone = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(everyone, weights)
    assert all(w.equal(weights) for w in everyone)                     # every rank has the same model
    torch.save((weights, state, held), f"{folder}/{world}-{rank}.pt")
    close_runtime()

def test_ranks_share_the_state_and_move_as_one(tmp_path):
    import torch.multiprocessing as mp
    seen = {}
    for world in (1, 2, 3):
        mp.spawn(_ranks, (world, str(tmp_path)), world)
        seen[world] = [torch.load(tmp_path/f"{world}-{r}.pt") for r in range(world)]
    weights, state, whole = seen[1][0]
    for world in (2, 3):
        assert (seen[world][0][0] - weights).norm() < 2e-5 * weights.norm()
        got = seen[world][0][1]["state"]                               # rank 0's is whole, in the form of one rank
        assert {i: {k: v.shape for k, v in s.items()} for i, s in got.items()} == \
               {i: {k: v.shape for k, v in s.items()} for i, s in state["state"].items()}
        for i, s in state["state"].items():
            for k, v in s.items(): assert (got[i][k] - v).norm() <= 1e-4 * v.norm()
        held = [h for *_, h in seen[world]]
        assert max(held) < 0.55 * whole and sum(held) < whole + 99         # shares, none twice (a stack of 2 makes 2 shares)
