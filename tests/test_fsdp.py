"""Models that torch's fully_shard has split: real processes, on CPU with gloo; see fsdp_driver.py."""

import pytest

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
