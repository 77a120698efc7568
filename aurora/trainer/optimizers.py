"""The optimizers of a run, from its config."""

from typing import Any

import torch
import torch.distributed as dist

import aurora
from aurora.config import Config, check_hparams, typed_table
from aurora.errors import Exit, HarnessError
from aurora.trainer.ranks import Ranks
from aurora.trainer.scheduled import keep_peaks


def checked_hparams(config: Config) -> dict[str, Any]:
    """The optimizer's table, with keys and types checked against its signature."""
    name = config.optimizer
    try:
        types = aurora.hparam_types(name)
    except ValueError as error:
        raise HarnessError(Exit.CONFIG, f"[optimizer.{name}]: {error}") from error
    optional = set(types) - set(aurora.REQUIRED_HPARAMS)
    hparams = typed_table(config.hparams, types, f"optimizer.{name}", optional)
    check_hparams(name, hparams)
    return hparams


def build_optimizers(config: Config, params: list[aurora.Param]) -> list[torch.optim.Optimizer]:
    """The rule first, see aurora.build(); its matrices are shared out over all ranks."""
    process_group = dist.group.WORLD if dist.is_initialized() else None
    try:
        optimizers = aurora.build(config.optimizer, params, config.hparams, process_group)
    except ValueError as error:
        raise HarnessError(Exit.CONFIG, f"optimizer.{config.optimizer}: {str(error)[:300]}") from error
    keep_peaks(optimizers, config)
    return optimizers


def fix_polar_dtype(optimizers: list[torch.optim.Optimizer], ranks: Ranks) -> None:
    """Let all ranks compute in the dtype that "auto" means on rank 0; a checkpoint holds it, and so fixes it too."""
    for group in optimizers[0].param_groups:
        if group.get("polar_dtype") == "auto":
            dtype = str(aurora.compute_dtype("auto", ranks.device)).removeprefix("torch.")
            group["polar_dtype"] = ranks.all_gather_object(dtype)[0]
