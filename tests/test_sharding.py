"Parameters split over ranks: the same steps, the same state, less held; bfloat16 and compiled blocks."
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from nanochat_nb.model import GPT, config_from_depth
from nanochat_nb.optim import make_optimizer, set_schedule
from nanochat_nb.runtime import close_runtime
from nanochat_nb.settings import NanochatError
from nanochat_nb.sharding import load_whole, local, shard_model, share, whole_state

def make(arch, split, dtype=torch.float32):
    model = GPT(config_from_depth(3, 70, 16, arch))                    # 70 rows, 3 blocks: nothing comes out even
    if split: shard_model(model, "cpu", dtype)
    return model, make_optimizer(model, weight_decay=.1, muon_beta2=.9, dtype=torch.float32)

def steps(model, opt, which, rank, world, dtype=torch.float32):
    for i in which:
        set_schedule(opt, i, 8)
        x = torch.randint(70, (12, 17), generator=torch.Generator().manual_seed(i))[rank::world]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32): loss = model(x[:, :-1], x[:, 1:])
        loss.backward(); opt.step(); opt.zero_grad()
    return loss.detach()

def _rank(rank, world, folder, arch):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{arch}{world}", rank=rank, world_size=world)
    seen = {}
    for split in (False, True):
        model, opt = make(arch, split)
        steps(model, opt, range(3), rank, world)
        sent = [[whole_state(model), opt.state_dict()]]
        dist.broadcast_object_list(sent)
        model, opt = make(arch, split)
        load_whole(model, sent[0][0]); opt.load_state_dict(sent[0][1])   # stopped and gone on with
        loss = steps(model, opt, range(3, 5), rank, world)
        held = sum(local(p).numel() for p in model.parameters()) + sum(v.numel() for s in opt.state.values() for v in s.values())
        seen[split] = loss, whole_state(model), opt.state_dict()["state"], held
    if rank == 0:
        (loss, weights, state, whole), (again, parts, shares, held) = seen.values()
        torch.testing.assert_close(again, loss, atol=1e-5, rtol=0)
        assert weights.keys() == parts.keys()
        for k, v in weights.items(): assert (parts[k] - v).norm() <= 2e-3 * v.norm()
        for i, s in state.items():
            for k, v in s.items(): assert (shares[i][k] - v).norm() <= 5e-3 * v.norm()
        assert held < 0.8 * whole
    right = sent[0][0]
    for bad, says in ((right | {"wte.weight": torch.zeros(80, 192)}, r"wte.weight is \(80, 192\)"), (right | {"more": torch.zeros(1)}, "more is"),
                      ({k: v for k, v in right.items() if k != "head.weight"}, "head.weight is None")):
        with pytest.raises(NanochatError, match=says): load_whole(model, bad)
    low = make(arch, True, torch.bfloat16)
    assert abs(steps(*low, range(5), rank, world, torch.bfloat16) - seen[True][0]) < 0.05
    if world == 2:
        fast = make(arch, True)
        for block in fast[0].blocks: block.compile(dynamic=False)
        torch.testing.assert_close(steps(*fast, range(5), rank, world), seen[True][0], atol=1e-4, rtol=0)
    close_runtime()

@pytest.mark.parametrize("arch,world", [("modern", 2), ("classic", 3), ("modern", 3)])
def test_split_parameters_move_as_whole_ones(tmp_path, arch, world):
    mp.spawn(_rank, (world, str(tmp_path), arch), world)

def test_alone_everything_is_mine():
    assert share(7) == (slice(0, 7), 7)
    model = GPT(config_from_depth(2, 64, 16))
    state = {k: v.clone() for k, v in GPT(config_from_depth(2, 64, 16), 3).state_dict().items()}
    load_whole(model, state)
    assert all(v.equal(state[k]) for k, v in whole_state(model).items())
