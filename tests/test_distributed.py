"""One class for any number of ranks: real processes under torchrun, on CPU with gloo."""

import pytest
import torch

import aurora
from aurora.sharding import assign_owners
from tests.conftest import OPTIMIZERS, events, losses, start_process, torchrun

MATRIX_RULES = [name for name in OPTIMIZERS if name != "adamw"]
MATRIX_NAMES = [
    f"blocks.{i}.{name}.weight"
    for i in range(2)
    for name in ("attention.q", "attention.k", "attention.v", "attention.out", "mlp.up", "mlp.down")
]


@pytest.fixture(scope="module")
def trained(tiny_track, tmp_path_factory):
    """Folder of the runs of every optimizer, for 1, 2 and 4 processes."""
    folders = {}
    for world_size in (1, 2, 4):
        out = tmp_path_factory.mktemp(f"world{world_size}")
        process = start_process(*torchrun(world_size), "tests/distributed_driver.py", str(tiny_track), str(out))
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        folders[world_size] = out
    return folders


def held(folder, optimizer):
    return [torch.load(path) for path in sorted((folder / optimizer).glob("rank*.pt"))]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_agree_with_one_process(trained, optimizer, world_size):
    one, many = losses(trained[1] / optimizer), losses(trained[world_size] / optimizer)
    assert many[-1][0] == 30 and events(trained[world_size] / optimizer)[0]["world_size"] == world_size
    for (step, loss), (many_step, many_loss) in zip(one, many, strict=True):
        assert many_step == step and many_loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_ranks_hold_bit_identical_weights(trained, optimizer, world_size):
    first, *others = held(trained[world_size], optimizer)
    assert len(others) == world_size - 1
    for other in others:
        assert all(torch.equal(other["weights"][name], weight) for name, weight in first["weights"].items())


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("optimizer", MATRIX_RULES)
def test_each_rank_holds_state_for_its_own_matrices_alone(trained, optimizer, world_size):
    owned = [rank["owned"] for rank in held(trained[world_size], optimizer)]
    assert sorted(name for names in owned for name in names) == sorted(MATRIX_NAMES)
    assert all(owned), "twelve matrices are enough for everyone"


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_dict_is_whole_on_every_rank_and_close_to_one_process(trained, optimizer, world_size):
    (one,) = held(trained[1], optimizer)
    for rank in held(trained[world_size], optimizer):
        assert set(rank["state"]["state"]) == set(one["state"]["state"]) and len(one["state"]["state"]) == 12
        for index, state in one["state"]["state"].items():
            assert set(rank["state"]["state"][index]) == set(state)
            for key, value in state.items():
                theirs = rank["state"]["state"][index][key]
                torch.testing.assert_close(theirs, value, atol=2e-3 * value.abs().max().item(), rtol=0)


@pytest.mark.parametrize("optimizer", MATRIX_RULES)
def test_state_dict_of_four_ranks_loads_into_one_process_bit_for_bit(trained, optimizer):
    saved = held(trained[4], optimizer)[2]
    named = [(name, torch.nn.Parameter(saved["weights"][name])) for name in MATRIX_NAMES]
    single = aurora.RULES[optimizer](named, lr=0.1)
    single.load_state_dict(saved["state"])
    for index, (_, p) in enumerate(named):
        for key, value in saved["state"]["state"][index].items():
            assert torch.equal(single.state[p][key], value)


def test_owners_share_the_cost_evenly_and_do_not_depend_on_the_rank():
    costs = [30] * 24 + [10] * 48
    for world_size in (1, 2, 3, 4, 8, 100):
        loads = [0] * world_size
        owners = assign_owners(costs, loads)
        assert sorted(set(owners)) == list(range(min(world_size, 72)))
        assert max(loads) <= max(30, 1.1 * sum(costs) / world_size)
        again = [0] * world_size
        assert assign_owners(costs, again) == owners and again == loads


def run_on_two_ranks(code, folder, *arguments):
    """Exit code and stderr of torchrun over a script with this code."""
    (folder / "driver.py").write_text(code)
    process = start_process(*torchrun(2), str(folder / "driver.py"), *arguments)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def test_more_ranks_than_matrices(tmp_path):
    """Two ranks, one matrix: the rank that owns nothing takes part in the collectives."""
    code = (
        "import os, sys, torch, torch.distributed as dist, aurora\n"
        "dist.init_process_group('gloo')\n"
        "p = torch.nn.Parameter(torch.ones(8, 4))\n"
        "p.grad = torch.full((8, 4), dist.get_rank() + 1.0)\n"
        "optimizer = aurora.Muon([p], lr=0.1)\n"
        "optimizer.reduce_gradients()\n"
        "assert dist.get_rank() == 1 or torch.equal(p.grad, torch.full((8, 4), 3.0))\n"
        "optimizer.step()\n"
        "assert (p < 1).all() and len(optimizer.state_dict()['state']) == 1\n"
        "open(os.path.join(sys.argv[1], f'passed{dist.get_rank()}'), 'w').close()\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    _, err = run_on_two_ranks(code, tmp_path, str(tmp_path))
    # Not the exit code: a gloo process may abort when its peer closes the connection first.
    assert (tmp_path / "passed0").exists() and (tmp_path / "passed1").exists(), err


def test_an_error_on_one_rank_alone_is_told_and_stops_all(tiny_track, tmp_path):
    code = (
        "import os, sys, train_gpt\n"
        "original = train_gpt.open_data\n"
        "def missing(config):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise train_gpt.HarnessError(train_gpt.Exit.DATA, 'no shard on this node')\n"
        "    return original(config)\n"
        "train_gpt.open_data = missing\n"
        "code = train_gpt.main(sys.argv[1:])\n"
        "open(os.path.join(sys.argv[-1], 'code' + os.environ['RANK']), 'w').write(str(code))\n"
    )
    _, err = run_on_two_ranks(code, tmp_path, "--config", str(tiny_track), "--out", str(tmp_path))
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["3", "3"], err
    assert err.count("error: on rank 1: no shard on this node") == 1


def test_ranks_that_disagree_are_named_and_stop(tiny_track, tmp_path):
    code = (
        "import os, sys, train_gpt\n"
        "original = train_gpt.GPT.init_weights\n"
        "train_gpt.GPT.init_weights = lambda self, seed: original(self, seed + int(os.environ['RANK']))\n"
        "sys.exit(train_gpt.main(sys.argv[1:]))\n"
    )
    exit_code, err = run_on_two_ranks(code, tmp_path, "--config", str(tiny_track), "--out", str(tmp_path))
    assert exit_code != 0
    assert "error: rank 1 has weights = " in err and "exitcode  : 8" in err


def test_non_finite_gradient_on_one_rank_stops_all_ranks_before_the_update(tiny_track, tmp_path):
    code = (
        "import os, sys, train_gpt\n"
        "original = train_gpt.forward_backward\n"
        "calls = []\n"
        "def poisoned(model, batch, run):\n"
        "    loss = original(model, batch, run)\n"
        "    calls.append(1)\n"
        "    if len(calls) == train_gpt.WARMUP_STEPS + 4 and os.environ['RANK'] == '1':\n"
        "        run.model.blocks[0].mlp.up.weight.grad[0, 0] = float('nan')\n"
        "    return loss\n"
        "train_gpt.forward_backward = poisoned\n"
        "code = train_gpt.main(sys.argv[1:])\n"
        "open(os.path.join(sys.argv[-1], 'code' + os.environ['RANK']), 'w').write(str(code))\n"
    )
    _, err = run_on_two_ranks(code, tmp_path, "--config", str(tiny_track), "--out", str(tmp_path))
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["5", "5"], err
    assert "step 4: loss is finite, first bad gradient: blocks.0.mlp.up.weight" in err
    assert events(tmp_path)[-1]["status"] == "diverged"


def test_a_killed_rank_is_reported_by_the_others(tiny_track, tmp_path):
    code = (
        "import os, signal, sys, train_gpt\n"
        "original = train_gpt.forward_backward\n"
        "calls = []\n"
        "def dying(model, batch, run):\n"
        "    calls.append(1)\n"
        "    if len(calls) == train_gpt.WARMUP_STEPS + 4 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(model, batch, run)\n"
        "train_gpt.forward_backward = dying\n"
        "sys.exit(train_gpt.main(sys.argv[1:]))\n"
    )
    exit_code, err = run_on_two_ranks(code, tmp_path, "--config", str(tiny_track), "--out", str(tmp_path))
    assert exit_code != 0 and "Traceback" not in err.split("torch/distributed")[0]
    assert "error: rank 0 lost a peer" in err
