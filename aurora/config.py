"""What a run is told by its track (TOML) and --set: tables, optimizers, schedules. Needs nothing but Python."""

import copy
import dataclasses
import functools
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from aurora.bounds import check_bounds
from aurora.errors import Exit, HarnessError
from aurora.schedule import (
    PEAKS,
    ROLES,
    SHORT_FORM,
    Pieces,
    check_spans,
    checked_pieces,
    highest,
    needs_short_form,
)
from aurora.text import encoding_of, suggest
from aurora.typed import apply_override, check_bound, check_keys, coerce, typed_table, with_default

ROOT = Path(__file__).resolve().parents[1]  # the checkout; data paths of tracks begin here


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model.

    Attributes:
        vocab_size: Number of different tokens; at most 65536, since shards hold uint16.
        num_layers: Number of transformer blocks, at most 256.
        model_dim: Width of the residual stream.
        num_heads: Attention heads of each block; model_dim / num_heads must be a multiple of 4.
        seq_len: Length of a sequence [tokens].
        mlp_expansion: Hidden width of the MLPs [model_dim].
        rope_base: Base of the rotary positions, above 1; their slowest turn is 1 / rope_base of a radian a token.
        attention_scale: Factor on the products of queries and keys, which are normed.
        logit_softcap: Logits stay between minus and plus this value, which is in (0, 64].
        activation_dtype: Dtype of the activations, float32 or bfloat16; weights are float32.
        bias: Whether linear layers have a bias, the head included.
        mlp: Kind of the MLPs, relu2 or swiglu; both are mlp_expansion x model_dim wide.
        head_dtype: What the head's matmuls read. activation: the dtype of the activations. float8: 8-bit floats, see
            aurora/fast/float8.py; vocab_size and model_dim must then be multiples of 16.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    seq_len: int
    mlp_expansion: int
    rope_base: float
    attention_scale: float
    logit_softcap: float
    activation_dtype: str
    bias: bool = True
    mlp: str = "relu2"
    head_dtype: str = "activation"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The token shards.

    Attributes:
        train: Glob of the training shards, relative to the folder of train_gpt.py.
        val: Glob of the validation shards, likewise.
        allow_epochs: Whether shards may be read more than once; the record says how often.
    """

    train: str
    val: str
    allow_epochs: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training steps.

    Attributes:
        steps: Length of the run and, unless schedule.planned_steps says otherwise, of its schedule, at most 1,000,000.
            The optimizer's own steps come before it, --set train.steps before both [steps].
        batch_tokens: Size of one step's batch over all ranks and micro-steps; a multiple of seq_len [tokens].
        micro_batch: Most sequences in one forward pass of one rank. auto: as many as fit into memory [sequences].
        compile: Whether the model is compiled: on, off, or auto, which compiles on CUDA only.
        log_every: Steps that one train event of the record covers [steps].
        checkpoint_every: Interval between checkpoints, with one more at the end; 0: only when asked to stop [steps].
        save_model: Whether a finished run leaves its weights beside its record, as <run_id>.safetensors: four bytes a
            parameter.
        shard: What several ranks share out. owners: whole matrices, each with its gradient and state on one owner; all
            ranks hold all weights. fsdp2: the rows of weights, gradients and state, by torch's fully_shard.
        recompute: Whether a block's activations are computed again in its backward pass instead of kept (activation
            checkpointing): about a third more time, much less memory. With shard = "fsdp2".
    """

    steps: int
    batch_tokens: int
    micro_batch: int | str
    compile: str
    log_every: int
    checkpoint_every: int
    save_model: bool = True
    shard: str = "owners"
    recompute: bool = False

    def saves_at(self, step: int) -> bool:
        """Whether the run saves a checkpoint before this step, or after its last."""
        return self.checkpoint_every > 0 and (step % self.checkpoint_every == 0 or step == self.steps)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The validations.

    Attributes:
        tokens: Size of a validation: the first tokens of the validation shard; a multiple of seq_len [tokens].
        every: Interval between validations [steps].
        late_every: Interval between validations over the last late_frac of the run [steps].
        late_frac: Share of the run, at its end, with a validation every late_every steps.
        target: Validation loss to reach [nats a token].
        telemetry: Whether the record says how neurons fare, see aurora/trainer/neurons.py.
    """

    tokens: int
    every: int
    late_every: int
    late_frac: float
    target: float
    telemetry: bool = True


RoleSchedule = dict[str, Pieces]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What changes from step to step: learning rates, and if you like weight decay and momentum.

    A table [optimizer.NAME.schedule] has the same keys but the first two. What it gives comes before this table's.

    Attributes:
        cooldown_frac: The short form of lr: share of the planned steps, at their end, over which learning rates fall
            linearly. Needed, with final_lr_frac, unless lr has pieces for every role.
        final_lr_frac: Learning rate at the end, as a share of its peak.
        planned_steps: Length of the schedule, at least train.steps, where the run ends; by default train.steps [steps].
        lr: Learning rates, as shares of those in the optimizer's table.
        weight_decay: Weight decay, as a share of that in the optimizer's table.
        momentum: Momentum, the value itself, of the groups that have one; AdamW's betas stay as they are.
        matrix: lr, weight_decay and momentum of the matrices, instead of those of all roles.
        embed: Likewise, of the token embedding.
        head: Likewise, of the output head's matrix.
        vector: Likewise, of biases and norm gains.
    """

    cooldown_frac: float | None = None
    final_lr_frac: float | None = None
    planned_steps: int | None = None
    lr: Pieces | None = None
    weight_decay: Pieces | None = None
    momentum: Pieces | None = None
    matrix: RoleSchedule | None = None
    embed: RoleSchedule | None = None
    head: RoleSchedule | None = None
    vector: RoleSchedule | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run.

    Attributes:
        optimizer: Name of the optimizer, whose table is [optimizer.NAME].
        rule: Where its class is: the name of a file in aurora/optim, by default that of the table, or module:Class.
        parameters: What it updates: matrices, while AdamW updates the rest, which is the default; or all, with one lr,
            if it is an optimizer of others.
        warmup_steps: Linear warm-up of the learning rates in the short form, from the optimizer's table [steps].
        projection_init: Standard deviation of attention.out's and mlp.down's weights at the start, times sqrt(fan-in),
            from the optimizer's table. 0 is the benchmark's; rules that keep norms (hyperball) need another.
        hparams: The rest of that table; see aurora.optim.registry.hparam_types().
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    schedule: ScheduleConfig
    optimizer: str
    rule: str
    parameters: str
    warmup_steps: int
    projection_init: float
    hparams: dict[str, Any]


MATRICES, ALL = "matrices", "all"
# AdamW's settings for what is no matrix, which every table has.
AUX_KEYS = ("embed_lr", "head_lr", "vector_lr", "aux_betas", "aux_eps", "aux_weight_decay")


# Where to look for modules after sys.path, if not in the current folder: compare.py starts its runs in another.
FOLDER_VARIABLE = "SPEEDRUN_FOLDER"


def is_path(optimizer: str) -> bool:
    """Whether this names an optimizer by where to import it, as in torch.optim:SGD."""
    return ":" in optimizer


def name_of(optimizer: str) -> str:
    """The name of the table of what --optimizer names."""
    return optimizer.rpartition(":")[2]


def load_config(path: Path, optimizer: str, overrides: Iterable[str] = ()) -> Config:
    """parse_config() of a file. Raises HarnessError: CONFIG."""
    return parse_config(read_track(path), path, optimizer, overrides)


def read_track(path: Path) -> str:
    """The text of a track. Read once: a pipe has nothing to give the second time, and a file may change meanwhile."""
    try:
        content = path.read_bytes()
        if (encoding := encoding_of(content[:4])) != "utf-8":
            fix = "save it as UTF-8 without a byte order mark"
            raise HarnessError(Exit.CONFIG, f"config {path} is in {encoding}; {fix}")
        text = content.decode()
    except OSError as error:
        raise HarnessError(Exit.CONFIG, f"config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HarnessError(Exit.CONFIG, f"config {path} is not valid TOML: {error}") from error
    if not text.strip():
        raise HarnessError(Exit.CONFIG, f"config {path} is empty; a pipe can be read by one process alone, use a file")
    return text


@functools.lru_cache(maxsize=16)
def parsed_toml(text: str) -> dict[str, Any]:
    """Not to be changed: thousands of records embed one track."""
    return tomllib.loads(text)


def parse_config(track: str, path: Path, optimizer: str, overrides: Iterable[str] = ()) -> Config:
    """Parse a track, apply "a.b=v" overrides, check every table but the optimizers' own keys.

    Args:
        path: for messages.
        optimizer: the name of a table, or module:Class. That needs no table: it has what [optimizer.adamw] says of
            AdamW's part, and its constructor's defaults.

    Raises:
        HarnessError: CONFIG, naming file, key, value and what would be right.
    """
    try:
        tables = copy.deepcopy(parsed_toml(track))
    except (ValueError, RecursionError) as error:  # ValueError: no TOML, too many digits
        raise HarnessError(Exit.CONFIG, f"config {path} is not valid TOML: {str(error)[:200]}") from error
    overrides = list(overrides)
    name = name_of(optimizer)
    if is_path(optimizer) and isinstance(tables.setdefault("optimizer", {}), dict):
        tables["optimizer"].setdefault(name, {"rule": optimizer})
    for override in overrides:
        apply_override(tables, override)

    hints = get_type_hints(Config).items()
    sections = {name: hint for name, hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    optimizer_tables = tables.pop("optimizer", {})
    entries = optimizer_tables.values() if isinstance(optimizer_tables, dict) else [optimizer_tables]
    if not all(isinstance(entry, dict) for entry in entries):
        raise HarnessError(
            Exit.CONFIG,
            f"{path.name}: optimizer must hold tables, as in [optimizer.muon]; a value of one is optimizer.muon.lr",
        )
    check_keys(tables, sections, path.name)
    if name not in optimizer_tables:
        known = ", ".join(optimizer_tables) or "none"
        raise HarnessError(
            Exit.CONFIG,
            f"unknown optimizer {name!r}{suggest(name, optimizer_tables)}; {path.name} has {known}; "
            f"one of another package is module:Class, as in {path_like(name)}",
        )
    hparams = dict(optimizer_tables[name])
    if (steps := pop_steps(hparams, overrides)) is not None and isinstance(tables["train"], dict):
        tables["train"] = tables["train"] | {"steps": coerce(f"optimizer.{name}.steps", steps, int)}
    parts: dict[str, Any] = {
        section: cls(**typed_table(tables[section], get_type_hints(cls), section, with_default(cls)))
        for section, cls in sections.items()
        if cls is not ScheduleConfig
    }
    parts["schedule"] = parse_schedule(tables["schedule"], hparams.pop("schedule", {}), name)
    warmup_steps = coerce(f"optimizer.{name}.warmup_steps", hparams.pop("warmup_steps", 0), int)
    projection_init = coerce(f"optimizer.{name}.projection_init", hparams.pop("projection_init", 0.0), float)
    rule, parameters = pop_rule(hparams, name, optimizer, path)
    if is_path(rule) and parameters == MATRICES:
        adamw = optimizer_tables.get("adamw", {})
        hparams = {key: adamw[key] for key in AUX_KEYS if key in adamw} | hparams
    config = Config(
        **parts,
        optimizer=name,
        rule=rule,
        parameters=parameters,
        warmup_steps=warmup_steps,
        projection_init=projection_init,
        hparams=hparams,
    )
    check_bounds(config)
    check_schedules(config)
    return config


def recorded(config: Config) -> dict[str, Any]:
    """The config as a record has it: of the schedule, what is declared. Older records have no train.shard, so it is
    there if it is not the default."""
    tables = dataclasses.asdict(config)
    if config.train.shard == "owners":
        del tables["train"]["shard"]
    return tables | {"schedule": {key: value for key, value in tables["schedule"].items() if value is not None}}


def told_hparams(config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a recorded config as the run event tells them: those of the trainer with them."""
    init = {"projection_init": config["projection_init"]} if config.get("projection_init") else {}
    return config["hparams"] | {"warmup_steps": config["warmup_steps"]} | init


def parse_schedule(track: Any, own: Any, optimizer: str) -> ScheduleConfig:
    """The schedule of an optimizer, from the tables [schedule] and [optimizer.NAME.schedule], which comes first."""
    own_label = f"optimizer.{optimizer}.schedule"
    known = list(get_type_hints(ScheduleConfig))
    track, own = checked_schedule(track, known, "schedule"), checked_schedule(own, known[2:], own_label)
    short = [key for key in SHORT_FORM if key in track]
    if short and not needs_short_form(track):
        message = (
            f"schedule has both lr and {' and '.join(short)}: drop {' and '.join(short)}, or move lr to {own_label}"
        )
        raise HarnessError(Exit.CONFIG, message)
    merged = track | {key: value for key, value in own.items() if key not in ROLES}
    for role in ROLES:
        # What an optimizer has for all roles comes before what the track has for one.
        kept = {key: value for key, value in track.get(role, {}).items() if key not in own}
        merged[role] = kept | own.get(role, {})
    if not needs_short_form(merged):
        merged = {key: value for key, value in merged.items() if key not in SHORT_FORM}
    elif missing := [repr(key) for key in SHORT_FORM if key not in merged]:
        message = f"schedule lacks the key{'s' * (len(missing) > 1)} {', '.join(missing)}, or lr for every role"
        raise HarnessError(Exit.CONFIG, message)
    return ScheduleConfig(**{key: value for key, value in merged.items() if value != {}})


def checked_schedule(table: Any, known: list[str], label: str) -> dict[str, Any]:
    """A table of schedules with every value as its type."""
    check_keys(table, known, label, optional=known)
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{label}.{key}"
        if key in ROLES:
            check_keys(value, PEAKS, name, optional=PEAKS)
            found[key] = {part: pieces_at(f"{name}.{part}", part, pieces) for part, pieces in value.items()}
        else:
            found[key] = (
                pieces_at(name, key, value)
                if key in PEAKS
                else coerce(name, value, int if key == "planned_steps" else float)
            )
    return found


def pieces_at(label: str, key: str, value: Any) -> Pieces:
    try:
        return checked_pieces(value, key, label)
    except ValueError as error:
        raise HarnessError(Exit.CONFIG, str(error)) from error


def check_schedules(config: Config) -> None:
    """Raise HarnessError for pieces that do not follow each other, or a lr that they never let get to its peak."""
    schedule, steps = vars(config.schedule), config.train.steps
    planned = config.schedule.planned_steps or steps
    warmup = f"optimizer.{config.optimizer}.warmup_steps"
    if config.warmup_steps and not needs_short_form(schedule):
        message = f"{warmup} = {config.warmup_steps} is for the short form: drop it, and begin lr with a rising piece"
        raise HarnessError(Exit.CONFIG, message)
    for place in (None, *ROLES):
        table = schedule if place is None else schedule[place] or {}
        for key in PEAKS:
            pieces, label = table.get(key), ".".join(filter(None, ("schedule", place, key)))
            label = f"{config.optimizer}'s {label}"
            if not pieces:
                continue
            try:
                check_spans(pieces, planned, label)
            except ValueError as error:
                raise HarnessError(Exit.CONFIG, str(error)) from error
            if key == "lr" and (share := highest(pieces, planned, steps)) < 1:
                message = f"{label} goes up to {share:.3g} of the optimizer's lr in the run's {steps} steps"
                raise HarnessError(Exit.CONFIG, f"{message}; let it get to 1, and lower the optimizer's lr instead")


def path_like(name: str) -> str:
    """A way to write module:Class that is near to a name that has no colon."""
    module, _, cls = name.rpartition(".")
    return f"{module}:{cls}" if module and cls else "torch.optim:SGD"


def pop_rule(table: dict[str, Any], name: str, optimizer: str, path: Path) -> tuple[str, str]:
    """Take out of an optimizer's table where its class is, and what it updates. optimizer: what --optimizer says."""
    rule = coerce(f"optimizer.{name}.rule", table.pop("rule", name), str)
    if is_path(optimizer) and rule != optimizer:
        raise HarnessError(
            Exit.CONFIG,
            f"--optimizer {optimizer}, but {path.name} has a table [optimizer.{name}] of the rule {rule}: "
            f'give {optimizer} a table of another name, with rule = "{optimizer}"',
        )
    parameters = coerce(f"optimizer.{name}.parameters", table.pop("parameters", MATRICES), str)
    check_bound(f"optimizer.{name}.parameters", parameters, parameters in (MATRICES, ALL), f"{MATRICES} or {ALL}")
    if parameters == ALL and (aux := [key for key in AUX_KEYS if key in table]):
        message = f'optimizer.{name}.{aux[0]} means nothing with parameters = "all": all of them share lr; leave it out'
        raise HarnessError(Exit.CONFIG, message)
    return rule, parameters


def pop_steps(table: dict[str, Any], overrides: Iterable[str]) -> Any:
    """Take an optimizer's own schedule length out of its table. None without one, or if --set train.steps decides."""
    steps = table.pop("steps", None)
    return None if any(override.partition("=")[0].strip() == "train.steps" for override in overrides) else steps
