"""The optimizers of a run, from its config."""

from typing import Any

import torch
import torch.distributed as dist

import aurora
from aurora.bounds import check_hparams
from aurora.config import ALL, AUX_KEYS, Config, is_path
from aurora.errors import Exit, HarnessError
from aurora.optim.external import make, source_of, two_gradients
from aurora.trainer.probe import NotSuited, probe, tiny
from aurora.trainer.ranks import Ranks
from aurora.trainer.scheduled import keep_peaks
from aurora.typed import typed_table


def checked_hparams(config: Config) -> dict[str, Any]:
    """The optimizer's table, with keys and types checked against its constructor's signature; with its lr."""
    label = f"optimizer.{config.optimizer}"
    try:
        types, defaults = aurora.hparam_types(config.rule), aurora.hparam_defaults(config.rule)
    except ValueError as error:
        where = f"[optimizer.{config.optimizer}]" if config.rule == config.optimizer else f"optimizer {config.rule}"
        raise HarnessError(Exit.CONFIG, f"{where}: {error}") from error
    if why := two_gradients(aurora.find_rule(config.rule)):
        raise HarnessError(Exit.CONFIG, f"{label}: {config.rule} cannot train here: {why}")
    if "lr" not in types:
        message = f"{label}: {config.rule} takes no lr, which the schedule sets"
        raise HarnessError(Exit.CONFIG, f"{message}; name a function of yours that takes one and gives the optimizer")
    if config.parameters == ALL:
        types = {key: hint for key, hint in types.items() if key not in AUX_KEYS}
    table = dict(config.hparams)
    if "lr" not in table and is_path(config.rule) and is_number(defaults.get("lr")):
        table["lr"] = float(defaults["lr"])
    if "lr" not in table and is_path(config.rule):
        raise HarnessError(Exit.CONFIG, f"{label} needs an lr, for {config.rule} has none: --set {label}.lr=0.001")
    needed = {*aurora.REQUIRED_HPARAMS} | (types.keys() - defaults.keys() if is_path(config.rule) else set())
    hparams = typed_table(table, types, label, set(types) - needed)
    check_hparams(config.optimizer, hparams)
    if hparams.get("cautious_decay") and not hparams.get("weight_decay"):
        message = f"{label}.cautious_decay changes nothing without {label}.weight_decay; set that, or drop it"
        raise HarnessError(Exit.CONFIG, message)
    if hparams.get("hyperball") and not config.projection_init:
        message = f"{label}.hyperball keeps norms, but attention.out and mlp.down start from 0"
        raise HarnessError(Exit.CONFIG, f"{message}; set {label}.projection_init, to 1 for example")
    return hparams


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)


def build_optimizers(config: Config, params: list[aurora.Param]) -> list[torch.optim.Optimizer]:
    """The rule first, see aurora.build(); its matrices are shared out over all ranks."""
    is_whole = config.train.shard == "owners"
    process_group = dist.group.WORLD if dist.is_initialized() and is_whole else None
    try:
        optimizers = aurora.build(config.rule, params, config.hparams, process_group, config.parameters)
    except ValueError as error:
        raise HarnessError(Exit.CONFIG, f"optimizer.{config.optimizer}: {str(error)[:300]}") from error
    keep_peaks(optimizers, config)
    return optimizers


def is_rule_of_ours(config: Config) -> bool:
    return aurora.is_ours(aurora.find_rule(config.rule))


def stand_ins(params: list[aurora.Param]) -> list[aurora.Param]:
    """Small parameters in the place of some without memory, which constructors of others may want to read."""
    shapes = [tiny(param.tensor.shape) for param in params]
    return [
        param._replace(tensor=torch.nn.Parameter(torch.zeros(shape)))
        for param, shape in zip(params, shapes, strict=True)
    ]


def probe_rule(config: Config, params: list[aurora.Param], device: torch.device) -> str:
    """Why a run with this optimizer of others could not go on from a checkpoint; empty where it could.

    Raises:
        HarnessError: CONFIG, it cannot train here at all.
    """
    rule = aurora.find_rule(config.rule)
    hparams = {key: value for key, value in config.hparams.items() if key not in AUX_KEYS}
    role = "all" if config.parameters == ALL else "matrix"
    shapes = [param.tensor.shape for param in params if role in ("all", param.role)]
    try:
        return probe(lambda own: make(rule, own, hparams, role), shapes, device)
    except (NotSuited, ValueError) as error:
        message = f"optimizer.{config.optimizer}: {config.rule} cannot train here: {error}"
        if "create_graph" in source_of(rule):
            message += "; it wants backward(create_graph=True), for second derivatives, and a step here has none"
        raise HarnessError(Exit.CONFIG, message) from error


def fix_polar_dtype(optimizers: list[torch.optim.Optimizer], ranks: Ranks) -> None:
    """Let all ranks compute in the dtype that "auto" means on rank 0; a checkpoint holds it, and so fixes it too."""
    for group in optimizers[0].param_groups:
        if group.get("polar_dtype") == "auto":
            dtype = str(aurora.compute_dtype("auto", ranks.device)).removeprefix("torch.")
            group["polar_dtype"] = ranks.all_gather_object(dtype)[0]
