"""What the run event must say, derived anew from the track, command line, seed and sources that it embeds.

Executes nothing of it. The schema is that of aurora/config.py; shapes come from the config.
"""

import ast
import contextlib
import dataclasses
import functools
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aurora.command_line import make_parser
from aurora.config import AUX_KEYS, ROOT, Config, ModelConfig, is_path, parse_config, recorded, told_hparams
from aurora.errors import HarnessError
from aurora.fast.definitions import definitions_of, hashes
from aurora.typed import with_default
from scripts.verification.events import Events
from scripts.verification.external import default_lr, same_value
from scripts.verification.groups import parsed
from scripts.verification.same import is_same
from scripts.verification.schema import Code

# Hyper-parameters that are floats for every rule, whatever the track writes.
FLOATS = ("lr", "embed_lr", "head_lr", "vector_lr", "aux_eps", "aux_weight_decay", "weight_decay", "momentum", "eps")


def check_config(run: Events) -> Iterator[str]:
    start, config = run.start, run.config
    if config["optimizer"] != start["optimizer"]:
        yield f"optimizer is {start['optimizer']}, that of the config {config['optimizer']}"
    if not is_same(sorted_items(told_hparams(config)), sorted_items(start["hparams"])):
        yield "hparams are not those of the config"
    names = [name for name in start["sources"] if name.endswith(".toml")]
    if len(names) != 1:
        yield f"{len(names)} tracks are embedded"
        return
    try:
        args = parsed_argv(start["argv"])
        if args is None:
            yield f"argv {str(start['argv'])[:100]} is no command line of train_gpt.py"
            return
        wanted = parse_config(start["sources"][names[0]], Path(names[0]), args.optimizer, args.overrides)
    except HarnessError as error:
        yield f"argv does not fit the embedded track: {error}"
        return
    for name, found, value in (
        ("optimizer", start["optimizer"], wanted.optimizer),
        ("seed", start["seed"], args.seed),
        ("the track's name", re.sub("[^A-Za-z0-9._-]", "-", Path(names[0]).stem), run_name(Path(args.config))),
    ):
        if not is_same(found, value):
            yield f"{name} is {found}, by argv {value}"
    yield from wrong_config(config, wanted, Code(start["sources"]))
    yield from wrong_hparams(start, wanted)
    expected = parameter_counts(wanted.model)
    if not run.is_edited and not is_same(sorted_items(start["params_by_role"]), sorted_items(expected)):
        yield f"parameter counts {start['params_by_role']} are not those of the model in the config, {expected}"
    yield from wrong_data(start["data"], wanted)
    yield from wrong_edits(start)
    for event in (start, *run.of("resume")):
        yield from wrong_way(event, wanted)


def sorted_items(table: dict[str, Any]) -> list[Any]:
    return [[key, table[key]] for key in sorted(table)]


def parsed_argv(argv: list[str]) -> Any:
    """The arguments of a command line of train_gpt.py, None if it is none."""
    if not argv or not argv[0].endswith("train_gpt.py"):
        return None
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return make_parser().parse_args(argv[1:])
    except SystemExit:
        return None


def run_name(path: Path) -> str:
    return re.sub("[^A-Za-z0-9._-]", "-", path.stem)


def wrong_config(found: dict[str, Any], wanted: Config, code: Code) -> Iterator[str]:
    """Where the config is not what the track and the command line give; a version may not know every setting yet."""
    for name, table in recorded(wanted).items():
        part = getattr(wanted, name)
        if not dataclasses.is_dataclass(part):
            continue
        values = found.get(name)
        if not isinstance(values, dict):
            yield f"config.{name} is no table"
            continue
        for key, value in table.items():
            if key not in values and key in with_default(type(part)) and not code.declares(key):
                continue
            if not is_same(values.get(key), value):
                yield f"{name}.{key} is {values.get(key)}, by the embedded track and argv {value}"
        for key in values.keys() - table.keys():
            yield f"{name}.{key} is {str(values[key])[:200]}, by the embedded track and argv there is none"
    for key in found.keys() - vars(wanted).keys():
        yield f"config.{key} is {str(found[key])[:60]}, by the embedded track and argv there is none"
    if not is_same(found["warmup_steps"], wanted.warmup_steps):
        yield f"warmup_steps is {found['warmup_steps']}, by the embedded track and argv {wanted.warmup_steps}"
    if not is_same(found.get("projection_init", 0.0), wanted.projection_init):
        init = f"by the embedded track and argv {wanted.projection_init}"
        yield f"projection_init is {str(found.get('projection_init'))[:60]}, {init}"
    for key in ("rule", "parameters"):
        if (key in found or code.holds(f"    {key}: str\n")) and not is_same(found.get(key), getattr(wanted, key)):
            yield f"{key} is {found.get(key)}, by the embedded track and argv {getattr(wanted, key)}"


def wrong_hparams(start: dict[str, Any], wanted: Config) -> Iterator[str]:
    """Hyper-parameters that are not those of the track and the command line."""
    found, is_other = start["config"], is_path(wanted.rule)
    for key in sorted(found["hparams"].keys() | wanted.hparams.keys()):
        value, own = wanted.hparams.get(key), found["hparams"].get(key)
        if is_other and key not in AUX_KEYS:  # whose types only its constructor knows
            if key == "lr" and key not in wanted.hparams:
                value = own if (default := default_lr(start)) is None else default
            if key not in found["hparams"] or not same_value(own, value):
                yield f"hparams.{key} is {own}, by the embedded track and argv {value}"
            continue
        if type(value) is int and (key in FLOATS or type(own) is float):  # as the constructor's types have it
            value = float(value)
        if isinstance(value, list) and "betas" in key:
            value = [float(item) for item in value]
        if not is_same(own, value):
            yield f"hparams.{key} is {own}, by the embedded track and argv {value}"


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """By role. Each block has four matrices of attention, and two or three of its MLP; the vectors are gains of norms,
    two a block and two more, and biases."""
    width, ins = model.mlp_expansion * model.model_dim, 2 if model.mlp == "swiglu" else 1
    table = model.vocab_size * model.model_dim
    matrix = model.num_layers * (4 * model.model_dim**2 + (ins + 1) * model.model_dim * width)
    vector = (2 * model.num_layers + 2) * model.model_dim
    if model.bias:
        vector += model.num_layers * (5 * model.model_dim + ins * width) + model.vocab_size
    return {"embed": table, "head": table, "matrix": matrix, "vector": vector}


def wrong_data(data: dict[str, Any], config: Config) -> Iterator[str]:
    """Shards that do not last for the steps, or are one shard twice; names, numbers and passes over them."""
    shards = data["shards"]
    steps_each = [max(0, (shard["num_tokens"] - 2) // config.train.batch_tokens) for shard in shards]
    steps, available = config.train.steps, sum(steps_each)
    if available < steps and not config.data.allow_epochs:
        yield f"the shards last for {available} steps of {steps}"
    elif available - (steps_each[-1] if steps_each else 0) >= steps:
        yield f"{len(shards)} shards are more than {steps} steps read"
    if "epochs" in data and not is_same(data["epochs"], steps / max(1, available)):
        yield f"data.epochs is {data['epochs']}, by shards and steps {steps / max(1, available)}"
    for key, what in (("sha256", "the tokens"), ("file", "the name")):
        values = [shard[key] for shard in shards]
        if repeated := {value for value in values if values.count(value) > 1}:
            yield f"shards share {what} {min(repeated)[:60]}: each may be read once"
    for shard in shards:
        if shard["max_token"] >= config.model.vocab_size:
            yield f"shard {shard['file']} holds token {shard['max_token']}, beyond the vocabulary of the config"


def wrong_edits(start: dict[str, Any]) -> Iterator[str]:
    if hidden := sorted(edits_in(start["sources"]) - {*start.get("model_edits", [])}):
        yield f"model_edits do not state that {hidden[0]}"


def notes_on_edits(run: Events) -> Iterator[str]:
    stated = {edit for edit in run.start.get("model_edits", []) if edit.endswith(" is edited")}
    if elsewhere := sorted(stated - edits_in(run.start["sources"])):
        yield f"{elsewhere[0]}, but not in the embedded train_gpt.py: where, the record does not tell"


def edits_in(sources: dict[str, str]) -> set[str]:
    """How the model in the embedded train_gpt.py is another than the mirrored one. What is patched in memory, no source
    shows."""
    how = "aurora/fast/definitions.py"
    if sources.get(how) != (ROOT / how).read_text(encoding="utf-8"):  # a version that may tell edits otherwise
        return set()
    return set(_edits_in(sources["train_gpt.py"], sources["aurora/fast/mirror.py"]))


@functools.lru_cache(maxsize=64)  # hundreds of records share their sources
def _edits_in(trainer: str, mirror: str) -> frozenset[str]:
    tree = parsed(mirror) or ast.Module([], [])
    tables = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MIRRORED"
    ]
    found, mirrored = hashes(definitions_of(trainer)), dict(*tables)
    names = (name for name in found.keys() | mirrored.keys() if found.get(name) != mirrored.get(name))
    return frozenset(f"{name} is edited" for name in names)


def wrong_way(event: dict[str, Any], config: Config) -> Iterator[str]:
    """Ranks, micro-batch and compilation that this config cannot have, of a run or resume event."""
    world_size, label = event["world_size"], f"{event['event']} event"
    sequences = config.train.batch_tokens // config.model.seq_len
    val_sequences = config.eval.tokens // config.model.seq_len
    if sequences % world_size or val_sequences % world_size:
        yield f"{label}: world_size {world_size} does not divide the {sequences} and {val_sequences} sequences"
        return
    size, own = event.get("micro_batch"), sequences // world_size
    planned = config.train.micro_batch
    if size is not None and (own % size if planned == "auto" else size != min(int(planned), own)):
        yield f"{label}: micro_batch is {size}, of {own} sequences a rank and train.micro_batch = {planned}"
    compiled, is_cuda = event.get("compiled"), event["device"] == "cuda"
    if compiled is not None and (
        compiled != (config.train.compile == "on") if config.train.compile != "auto" else compiled and not is_cuda
    ):
        yield f"{label}: compiled is {compiled} on {event['device']} with train.compile = {config.train.compile}"
    if event.get("forward") == "fast" and event.get("model_edits"):
        yield f"{label}: the fast forward pass is not of an edited model"
    if event.get("attention") == "blocked" and (
        event["device"] != "cpu" or event.get("forward") != "fast" or config.model.activation_dtype != "bfloat16"
    ):
        yield f"{label}: attention is blocked in fast passes in bfloat16 on CPUs alone"
    if event.get("kernels") == "triton" and not (is_cuda and compiled and event.get("forward") == "fast"):
        yield f"{label}: the kernels are of compiled fast passes on CUDA alone"
    env = event["env"]
    if event["device"] != "cuda" and env.get("cudnn") is not None:
        yield f"{label}: env.cudnn is {env['cudnn']} on {event['device']}"
