"""Rules that ask for inputs, modified steps and the benchmark's rules: two ranks take the steps of one process."""

SHARDED = """
import torch.distributed as dist
from aurora.trainer.ranks import join_ranks
from tests import test_board_rules, test_inputs, test_modifiers, test_rules
join_ranks(timeout_s=60)

def train(optimizer, params, steps):
    for number in range(steps):
        for index, p in enumerate(params):
            p.grad = test_inputs.gradient(p.shape, index, number)
        optimizer.step()

def check(make, steps, atol):
    ours, theirs = test_inputs.new_params(), test_inputs.new_params()
    sharded, whole = make(ours, process_group=dist.group.WORLD), make(theirs)
    train(sharded, ours, steps), train(whole, theirs, steps)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=atol, rtol=0)
    assert 0 < len(sharded.state) < len(ours)
    sharded.consolidate_state_dict()
    found = sharded.state_dict()
    for index, state in whole.state_dict()["state"].items():
        assert found["state"][index].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(found["state"][index][key], value, atol=100 * atol, rtol=1e-3)
    whole.load_state_dict(found)
    return ours

for rule in test_inputs.RULES:
    params = check(lambda params, **group: test_inputs.make(rule, params, **group), test_inputs.STEPS, 1e-5)
    test_inputs.assert_oracle(rule, params)
for rule in test_modifiers.RULES:
    for kind in ("hyperball, cautious", "floor, cautious"):
        options = dict(lr=0.1, **test_modifiers.MODIFIERS[kind])
        check(lambda params, **group: test_rules.make(rule, params, **options, **group), 4, 1e-5)
for rule in test_board_rules.BOARD_RULES:
    eps = test_board_rules.COARSE.get(rule, {})
    check(lambda params, **group: test_board_rules.make(rule, params, **eps, **group), 6, 1e-4)
print("passed", flush=True)
dist.barrier()
os._exit(0)
"""


def test_two_ranks_take_the_steps_of_one(launch):
    outcome = launch(world_size=2, patch=SHARDED, timeout_s=120)
    assert outcome.out == ["passed\n"] * 2, outcome.err
