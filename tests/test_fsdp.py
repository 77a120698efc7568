"""Models that torch's fully_shard has split: real processes, on CPU with gloo; see fsdp_driver.py."""

import pytest
import torch

import train_gpt
from aurora.config import load_config
from aurora.trainer.fsdp import recompute_blocks
from scripts.verification.checks import verify_run
from tests.conftest import BOARD_RULES, OPTIMIZERS, events, losses, often, tiny_table, train_here
from tests.fsdp_driver import RULES

SAVED = ["muon", "aurora folded", "unormuon", "adam", "shampoo", "psgd"]


def run(launch, world_size, check, *arguments, timeout_s=120):
    call = ", ".join(map(repr, (check, *arguments)))
    outcome = launch(
        world_size=world_size, patch=f"from tests import fsdp_driver\nfsdp_driver.main({call})", timeout_s=timeout_s
    )
    # Not the exit code: a gloo process may abort when its peer closes the connection first.
    assert outcome.out == ["passed\n"] * world_size, outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_twenty_steps_over_rows_are_those_of_one_process(launch, world_size):
    """All rules, with clipping and a scheduler."""
    run(launch, world_size, "check_rules", RULES, timeout_s=300)


def test_two_ranks_take_the_steps_of_one_and_refuse_what_they_cannot_take(launch):
    run(launch, 2, "check_all", [("check_rules", ["normuon"]), ("check_refusals",)])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_of_fully_shard_itself_bfloat16_and_modifiers(launch, world_size):
    rules = ["muon", "aurora folded", "normuon"]
    checks = [(check, rules) for check in ("check_own_backward", "check_bfloat16", "check_modifiers")]
    run(launch, world_size, "check_all", [*checks, *([("check_replicas", rules)] if world_size == 4 else [])])


@pytest.mark.slow
def test_checkpoints_of_two_ranks_load_on_one_and_four(launch, tmp_path):
    for world_size in (2, 1, 4):
        run(launch, world_size, "check_checkpoints", SAVED, str(tmp_path), world_size == 2)


# Larger than by default: no step is to hang on the rounding of a gradient that is almost zero, or of a matrix that is
# almost singular.
EPS = {"adam": "eps = 1e-6", "soap": "eps = 0.1", "pmuon": "eps = 1e-5", "shampoo": "gram_eps = 0.01"}


@pytest.fixture(scope="module")
def board_track(tiny_track, tmp_path_factory):
    """The tiny track, with the rules of the public board."""
    config = tmp_path_factory.mktemp("board") / "tiny.toml"
    tables = [f"{tiny_table(rule)}{EPS.get(rule, '')}\n" for rule in BOARD_RULES]
    config.write_text(tiny_track.read_text() + "".join(tables))
    return config


@pytest.fixture(scope="module")
def trained(board_track, launch, tmp_path_factory):
    """The end of a run of the tiny track, by optimizer, way of sharing and number of ranks."""
    found = {}

    def get(optimizer, shard, world_size, is_plain=False):
        key = optimizer, shard, world_size, is_plain
        if key not in found:
            out = tmp_path_factory.mktemp(f"{optimizer}{shard}{world_size}")
            arguments = ["--config", board_track, "--optimizer", optimizer, "--out", out, "--set", "train.steps=20"]
            patch = SAVE_WEIGHTS.format(folder=out) + PLAIN * is_plain
            outcome = launch(*arguments, *VOCAB, "--set", f"train.shard={shard}", world_size=world_size, patch=patch)
            assert outcome.codes == [0] * world_size, outcome.err
            found[key] = out, torch.load(out / "weights.pt")
        return found[key]

    return get


SAVE_WEIGHTS = """
original = train_gpt.train_steps
def train_steps(run, *rest):
    original(run, *rest)
    weights = run.weights()
    if rank == 0:
        torch.save(weights, "{folder}/weights.pt")
train_gpt.train_steps = train_steps
"""
# The forward pass that runs under fully_shard, by one process: the fast one rounds otherwise, and AdamW amplifies it.
PLAIN = """
from aurora.trainer import warmup
warmup.edits = lambda model: ["plain"]
"""
# Of 64 tokens one comes exactly as often as a uniform head says. So the first gradient of its bias is rounding alone,
# and AdamW's first step of it has either sign. Of 66 none can, in a batch of 512.
VOCAB = ("--set", "model.vocab_size=66")
CASES = [(n, shard, size) for n in (*OPTIMIZERS, *BOARD_RULES) for shard in ("owners", "fsdp2") for size in (2, 4)]


@pytest.mark.parametrize(
    "optimizer, shard, world_size", [often(case, case == ("aurora", "fsdp2", 2)) for case in CASES]
)
def test_runs_of_the_tiny_track_agree_with_one_process(trained, optimizer, shard, world_size):
    one_out, one = trained(optimizer, "owners", 1, is_plain=shard == "fsdp2")
    out, many = trained(optimizer, shard, world_size)
    for (step, loss), (many_step, many_loss) in zip(losses(one_out), losses(out), strict=True):
        assert many_step == step and abs(many_loss - loss) <= 1e-5
    assert not verify_run(next(out.glob("*.jsonl"))).reasons
    assert largest_difference(many, one) <= 1e-5
    if optimizer in BOARD_RULES:  # and eps has not made it Muon
        assert largest_difference(trained("muon", "owners", 1)[1], one) > 1e-3


def largest_difference(weights, others):
    return max((weights[name] - p).abs().max().item() for name, p in others.items())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_recomputed_blocks_take_the_same_steps(trained, launch, tiny_track, tmp_path, world_size):
    kept = trained("muon", "owners" if world_size == 1 else "fsdp2", world_size, is_plain=world_size == 1)[0]
    options = [*VOCAB, "--set", "train.steps=20", "--set", "train.shard=fsdp2", "--set", "train.recompute=true"]
    outcome = launch("--config", tiny_track, "--optimizer", "muon", "--out", tmp_path, *options, world_size=world_size)
    assert outcome.codes == [0] * world_size, outcome.err
    assert losses(tmp_path) == losses(kept)
    assert events(tmp_path)[-1]["weights_sha256"] == events(kept)[-1]["weights_sha256"]
    assert not verify_run(next(tmp_path.glob("*.jsonl"))).reasons


def test_recomputed_blocks_keep_their_input_alone(tiny_track):
    model = train_gpt.GPT(load_config(tiny_track, "muon").model)
    names = list(model.state_dict())
    tokens = torch.zeros(4, 32, dtype=torch.int64)

    def kept_bytes():
        kept = {}
        keep = lambda tensor: kept.update({tensor.data_ptr(): tensor.nbytes}) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens, tokens)
        loss.backward()
        return sum(kept.values()), [p.grad.clone() for p in model.parameters()]

    before, grads = kept_bytes()
    model.zero_grad()
    recompute_blocks(model)
    after, same_grads = kept_bytes()
    assert after < before / 2 and list(model.state_dict()) == names
    assert all(torch.equal(*pair) for pair in zip(grads, same_grads, strict=True))


STOP = """
from aurora.errors import Exit, HarnessError
original = train_gpt.train_step
def step(run, model, number, *rest):
    if number == {step}:
        raise HarnessError(Exit.PREEMPTED, "enough")
    return original(run, model, number, *rest)
train_gpt.train_step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "aurora", "normuon"])
def test_checkpoints_move_between_ways_of_sharing_and_numbers_of_ranks(twelve_steps, launch, tmp_path, optimizer):
    arguments = [*twelve_steps, "--optimizer", optimizer, "--out"]
    assert launch(*arguments, tmp_path / "whole").codes == [0]
    stages = [("owners", 1, 3), ("fsdp2", 2, 6), ("fsdp2", 4, 9), ("owners", 2, None)]
    for shard, world_size, stop in stages:
        command = [*arguments, tmp_path / "moved", "--resume", "--set", f"train.shard={shard}"]
        outcome = launch(*command, world_size=world_size, patch=STOP.format(step=stop))
        assert outcome.codes == [75 if stop else 0] * world_size, outcome.err
    whole, moved = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert len(moved) == len(whole) and [
        event["segment"] for event in events(tmp_path / "moved") if event["event"] == "resume"
    ] == [2, 3, 4]
    for (step, loss), (moved_step, moved_loss) in zip(whole, moved, strict=True):
        assert moved_step == step and moved_loss == pytest.approx(loss, rel=1e-4)
    assert not verify_run(next((tmp_path / "moved").glob("*.jsonl"))).reasons


@pytest.mark.parametrize(
    "option, message",
    [
        (
            ["--optimizer", "torch.optim:SGD", "--set", "optimizer.SGD.lr=0.1"],
            "torch.optim:SGD may need whole matrices",
        ),
        (["--set", "train.compile=on"], "the model runs eager; set it to 'owners'"),
        (["--dump-momentum", "*", "1", "2"], "--dump-momentum cannot be had with it"),
        (["--set", "train.shard=owners", "--set", "train.recompute=true"], "train.shard = 'owners'; set it to 'fsdp2'"),
        (["--set", "train.shard=rows"], "train.shard must be owners or fsdp2, got 'rows'"),
    ],
)
def test_what_cannot_be_had_with_fsdp2_is_told(tiny_track, tmp_path, capfd, option, message):
    arguments = ["--dry-run", *([] if "train.shard" in str(option) else ["--set", "train.shard=fsdp2"])]
    assert train_here(tiny_track, tmp_path, *arguments, *option) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
