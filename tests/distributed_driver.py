"""Run under torchrun: trains every optimizer on the tiny track and writes what each rank then holds.

torchrun ... distributed_driver.py CONFIG OUT
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train_gpt
from tests.conftest import OPTIMIZERS

# Runs of riemannian_aurora part company: its conjugate gradients amplify differences of summation order. That its steps
# do not depend on the number of ranks is tested with exact sums, by optimizer_driver.py.
COMPARED = [name for name in OPTIMIZERS if name != "riemannian_aurora"]


def main(config: str, out: Path) -> None:
    captured = {}
    original = train_gpt.train_steps

    def capture(run, *args):
        original(run, *args)
        captured["run"] = run
        captured["state"] = run.optimizers[-1].state_dict()

    train_gpt.train_steps = capture
    if os.environ["WORLD_SIZE"] != "1":
        # One group for all runs: a second one of this launch would read the first one's addresses from the store.
        dist.init_process_group("gloo")
        dist.init_process_group = dist.destroy_process_group = lambda *args, **kwargs: None
    for name in COMPARED:
        code = train_gpt.main(["--config", config, "--optimizer", name, "--out", str(out / name)])
        assert code == 0, f"{name}: exit code {code}"
        run = captured["run"]
        held = {
            "weights": {key: value.clone() for key, value in run.model.state_dict().items()},
            "state": captured["state"],
        }
        torch.save(held, out / name / f"rank{run.ranks.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
