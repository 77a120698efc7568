"""Is a record consistent with itself? Nothing in it is executed; scripts/verify.py --replay runs its code.

| check | catches | cannot catch |
|---|---|---|
| fields, order of events | torn, edited or merged files | a file rewritten as a whole |
| code hash, task hash, run id | changed sources, task, seed, optimizer, date | hashes computed anew after the change |
| config against embedded track and argv, optimizers as read back | a swapped config | all changed alike |
| train events at every step where the trainer writes one | what those checks need, left out | - |
| lr of each train event against the schedule | steps, lr or schedule edited | a logged lr that is not used |
| looks against the declared steps | early stop, extra or dropped looks | looks that were never logged |
| neurons: counts, shares and ranks within their bounds, at declared steps | impossible numbers | invented ones |
| times rise, step times add up, all differ; timed + untimed = wall | edited times, times typed in | a patched clock |
| step time against 6 N FLOP a token | impossible speed | a merely flattering one |
| a val loss is a sum of float32 over its tokens | losses typed in or rounded | a sum that was forged on purpose |
| loss of an untrained model, train against val loss | another vocabulary, leaked validation | slight leaks |
| end event against the looks | edited results | - |
| a folder's losses | duplicates | - |
| noted only: a folder's seeds | dropped seeds | seeds run elsewhere and left out at either end |
| noted only: sources against the commit they name | changes that the record keeps quiet about | another commit named |

A consistent record can still be invented: only a replay, and then seeds of the verifier's own, show that it is not. Nor
does a replay tell what the embedded code does: it is compared with nothing but that commit, and code that cheats
replays too.
"""

import functools
import hashlib
import itertools
import json
import math
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aurora.config import apply_override, pop_steps
from aurora.errors import HarnessError
from aurora.trainer.record import (
    FIELD_TYPES,
    NUMBER,
    ROOT,
    SCHEMA,
    RecordError,
    Run,
    Validation,
    code_hash,
    first_at_target,
    in_force,
    is_sane,
    json_hash,
    read_events,
    record_paths,
    seed_gaps,
    task_hash,
)
from scripts.verification.export import is_inside, overrides

# FLOP/s that no device of its kind reaches: above a B200's dense bfloat16, and a core with matrix units.
PEAK_FLOPS = {"cuda": 3e15, "mps": 1e14, "cpu": 2e12}
UNTRAINED_TOLERANCE = 0.05  # of the loss at step 0, from ln(vocab_size): the head starts at zero
# Nats between val losses of one step on two stacks, such as other ranks or threads, which add in another order:
# differences grow with steps, and a resume or replay repeats few.
OTHER_STACK_TOLERANCE = 2e-2


@dataclass
class Verification:
    """word: consistent, or refuted with reasons; gaps or replayed where that is known; see scripts/verify.py."""

    path: Path
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    word_if_good: str = "consistent"

    @property
    def word(self) -> str:
        return "refuted" if self.reasons else self.word_if_good


@dataclass
class Events:
    """A record's first event, all others in the order of the file, and those that no resume has undone."""

    start: dict[str, Any]
    rest: list[dict[str, Any]]

    def __post_init__(self) -> None:
        self.kept = in_force(self.rest)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.kept if event["event"] == kind]

    @property
    def config(self) -> dict[str, Any]:
        return self.start["config"]


def verify_run(path: Path) -> Verification:
    """Every check that one record allows. Never raises for what a record holds."""
    return verify_events(path)[0]


def verify_events(path: Path) -> tuple[Verification, Events | None]:
    verdict = Verification(path)
    try:
        events = [event for _, event in read_events(path)]
        if not events:
            raise RecordError(f"{path} holds no event")
        found = Events(events[0], events[1:])
        verdict.reasons += missing_fields(events) or wrong_numbers(found.start)
    except RecordError as error:
        verdict.reasons.append(str(error))
        return verdict, None
    if verdict.reasons:
        return verdict, None
    if not path.read_bytes().endswith(b"\n"):
        verdict.notes.append("the last line is torn, as a crash leaves it")
    for check in CHECKS:
        try:
            verdict.reasons += check(found)
        # A field of a type that no run writes; which one, the error says.
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, IndexError) as error:
            verdict.reasons.append(f"{check.__name__}: a field is missing or wrong ({type(error).__name__}: {error})")
    if not found.of("end"):
        verdict.notes.append("incomplete: no end event")
    if not verdict.reasons and (changed := changed_sources(found.start)):
        commit = found.start["git"]["commit"]
        verdict.notes.append(f"sources differ from commit {commit[:12]} in: {', '.join(changed)}")
    return verdict, found


def changed_sources(start: dict[str, Any]) -> list[str]:
    """Sources that are not those of the commit that the record names; none where that commit is not known here."""
    git = start.get("git")
    tree = hashes_of(str(git.get("commit"))) if isinstance(git, dict) else {}
    if not tree:
        return []
    hashes = {name: text.encode("utf-8", "surrogatepass") for name, text in start["sources"].items()}
    hashes = {name: hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() for name, data in hashes.items()}
    # A track of one's own is in no commit.
    return [name for name in hashes if tree.get(name) != hashes[name] and (name in tree or name.endswith(".py"))]


@functools.lru_cache
def hashes_of(commit: str) -> dict[str, str]:
    """Git's hash of each file of a commit, by name; empty without git or the commit."""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return {}
    command = ["git", "-C", str(ROOT), "ls-tree", "-r", "-z", commit]
    try:
        listing = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError, UnicodeDecodeError):
        return {}
    entries = (entry.partition("\t") for entry in listing.split("\0") if entry)
    return {name: description.split()[2] for description, _, name in entries}


def missing_fields(events: list[dict[str, Any]]) -> list[str]:
    optional = {"tokens", "segments", "untimed", "wall_s"}
    lacking = {
        f"{event['event']} event lacks {key}": None
        for event in events
        for key in FIELD_TYPES.get(str(event["event"]), {})
        if key not in event and key not in optional
    }
    return list(lacking)


# What the checks below compute with. A list in place of a number would be repeated, not multiplied.
NUMBERS = {
    "config.train": ("steps", "batch_tokens"),
    "config.model": ("vocab_size", "num_layers", "model_dim", "mlp_expansion", "seq_len"),
    "config.eval": ("tokens", "every", "late_every", "late_frac", "target"),
    "config.schedule": ("cooldown_frac", "final_lr_frac"),
    "config": ("warmup_steps",),
    "params_by_role": ("matrix", "head"),
    "hparams": ("lr",),
    "env": ("cpu_count",),
}


def wrong_numbers(start: dict[str, Any]) -> list[str]:
    tables = {}
    for name in NUMBERS:
        table: Any = start
        for key in name.split("."):
            table = table.get(key) if isinstance(table, dict) else None
        tables[name] = table if isinstance(table, dict) else {}
    groups = start.get("param_groups")
    rates = (
        [group.get("peak_lr") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else [None]
    )
    values = {f"{name}.{key}": tables[name].get(key) for name, keys in NUMBERS.items() for key in keys}
    values |= {f"param_groups[{i}].peak_lr": rate for i, rate in enumerate(rates)}
    return [
        f"{name} is no number: {str(value)[:40]}"
        for name, value in values.items()
        if not isinstance(value, NUMBER) or isinstance(value, bool) or not is_sane(value)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Checks of one record: each yields what is wrong, in words


def check_order(run: Events) -> Iterator[str]:
    kinds = [event["event"] for event in run.rest]
    unknown = set(kinds) - {"val", "train", "neurons", "resume", "end"}
    if unknown:
        yield f"events of unknown kinds: {sorted(map(str, unknown))}"
    for kind, following in itertools.pairwise(kinds):
        if kind == "end" and following != "resume":
            yield f"an end event is followed by a {following} event"
    stacks = {stack_of(segment) for segment in (run.start, *(e for e in run.rest if e["event"] == "resume"))}
    tolerance = OTHER_STACK_TOLERANCE if len(stacks) > 1 else 0.0
    seen: dict[int, float] = {}
    last = {"val": -1, "train": -1, "neurons": -1}
    for event in run.rest:
        kind = event["event"]
        if kind == "resume":
            last = dict.fromkeys(last, -1)
        if kind not in last:
            continue
        step = event["step"]
        if step <= last[kind]:
            yield f"{kind} event of step {step} stands after that of step {last[kind]}"
        last[kind] = step
        if kind == "val" and run.start["device"] == "cpu":
            before = seen.setdefault(step, event["val_loss"])
            if abs(before - event["val_loss"]) > tolerance:
                yield f"step {step} was run twice, with val_loss {before} and {event['val_loss']}"


def stack_of(segment: dict[str, Any]) -> str:
    """What the bits of a loss depend on, of a run or resume event."""
    parts = {key: segment.get(key) for key in ("world_size", "micro_batch", "attention", "compiled")}
    parts["kernels"] = segment.get("kernels", "torch")  # which the first records do not have
    return json.dumps([parts, *(segment["env"].get(key) for key in ("torch", "torch_threads", "cpu"))])


def check_identity(run: Events) -> Iterator[str]:
    start, config = run.start, run.config
    if start["schema"] != SCHEMA:
        yield f"schema {start['schema']} is not {SCHEMA}"
    if start["code_hash"] not in (code_hash(start["sources"]), first_code_hash(start["sources"])):
        yield "code_hash is not that of the embedded sources"
    if task_hash(config, start["data"]["stream_id"]) != start["task_hash"]:
        yield "task_hash is not that of the config and data"
    shards = [shard["sha256"] for shard in start["data"]["shards"]]
    fingerprint = hashlib.sha256("".join(shards).encode()).hexdigest()
    if fingerprint != start["data"]["fingerprint"]:
        yield "the data's fingerprint is not that of its shards"
    stream = fingerprint if start["data"].get("epochs", 0) > 1 else shards[0]
    if hashlib.sha256((stream + start["data"]["val_sha256"]).encode()).hexdigest() != start["data"]["stream_id"]:
        yield "the data's stream_id is not that of its shards and validation tokens"
    stamp = re.sub("[-:]", "", start["utc"][:19])
    if f"-{start['optimizer']}-s{start['seed']}-{stamp}-" not in start["run_id"]:
        yield f"run_id {start['run_id']} does not state optimizer, seed {start['seed']} and time {start['utc']}"
    bad = [name for name in start["sources"] if not is_inside(name)]
    if bad:
        yield f"names of sources lead out of their folder: {bad}"
    if bad := [name for name, text in start["sources"].items() if not isinstance(text, str)]:
        yield f"sources that are no text: {bad}"


def first_code_hash(sources: dict[str, str]) -> str:
    """code_hash as the first committed records formed it."""
    text = "".join(f"{name}:{text!r}" for name, text in sources.items() if name.endswith(".py"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_config(run: Events) -> Iterator[str]:
    start, config = run.start, run.config
    if config["optimizer"] != start["optimizer"]:
        yield f"optimizer is {start['optimizer']}, that of the config {config['optimizer']}"
    if config["hparams"] | {"warmup_steps": config["warmup_steps"]} != start["hparams"]:
        yield "hparams are not those of the config"
    model, counts = config["model"], start["params_by_role"]
    embed = model["vocab_size"] * model["model_dim"]
    mlp = (3 if model.get("mlp") == "swiglu" else 2) * model["mlp_expansion"]
    matrix = model["num_layers"] * (4 + mlp) * model["model_dim"] ** 2
    if [counts.get(role) for role in ("embed", "head", "matrix")] != [embed, embed, matrix]:
        yield f"parameter counts {counts} are not those of the model in the config"
    for group in start["param_groups"]:
        for key, value in group.items():
            name = hparam_name(key.removeprefix("peak_"), group["role"])
            if start["hparams"].get(name, value) not in (value, "auto"):
                yield f"the optimizer held {key} {value} for {group['role']}, {name} is {start['hparams'][name]}"
    argv, tracks = start["argv"], [text for name, text in start["sources"].items() if name.endswith(".toml")]
    if len(tracks) != 1:
        yield f"{len(tracks)} tracks are embedded"
    elif not argv or not argv[0].endswith("train_gpt.py"):
        yield f"argv {str(argv)[:100]} is no command line of train_gpt.py"
    else:
        tables, settings = tomllib.loads(tracks[0]), overrides(argv)[1::2]  # without the flags between
        try:
            for override in settings:
                apply_override(tables, override)
        except HarnessError as error:
            yield f"argv does not fit the embedded track: {error}"
            return
        table = dict(tables.pop("optimizer", {}).get(start["optimizer"], {}))
        if (steps := pop_steps(table, settings)) is not None:
            tables["train"]["steps"] = steps
        expected = tables | {"hparams": {key: value for key, value in table.items() if key != "warmup_steps"}}
        for name, values in expected.items():
            for key, value in values.items():
                if config[name].get(key) != value:
                    yield f"{name}.{key} is {config[name].get(key)}, by the embedded track and argv {value}"


def hparam_name(key: str, role: str) -> str:
    """Which hyper-parameter a setting of a parameter group comes from, where there is one."""
    return key if role == "matrix" else f"{role}_lr" if key == "lr" else f"aux_{key}"


def declared_looks(config: dict[str, Any]) -> set[int]:
    """The trainer's rule for the steps after which loss is measured."""
    steps, looks = config["train"]["steps"], config["eval"]
    if not 0 < steps < 10**6 or looks["every"] < 1 or looks["late_every"] < 1:
        raise ValueError(f"{steps} steps with looks every {looks['every']} and {looks['late_every']} cannot be")
    late_from = (1 - looks["late_frac"]) * steps
    return {s for s in range(steps) if s % looks["every" if s < late_from else "late_every"] == 0} | {steps}


def check_looks(run: Events) -> Iterator[str]:
    declared, steps = declared_looks(run.config), {event["step"] for event in run.of("val")}
    ends = run.of("end")
    last = run.config["train"]["steps"] if ends and ends[-1]["status"] == "done" else max(steps, default=0)
    if ends and ends[-1]["status"] == "done" and ends[-1]["step"] != last:
        yield f"done at step {ends[-1]['step']}, but the config plans {last} steps"
    extra, missing = steps - declared, {step for step in declared if step <= last} - steps
    if extra:
        yield f"validated at steps that the config does not declare: {sorted(extra)[:5]}"
    if missing:
        yield f"not validated at declared steps: {sorted(missing)[:5]}"
    for event in run.of("val"):
        if event.get("tokens", 0) != event["step"] * run.config["train"]["batch_tokens"] and "tokens" in event:
            yield f"step {event['step']}: tokens {event['tokens']} are not step x batch_tokens"


def declared_logs(run: Events) -> set[int]:
    """The trainer's rule for the steps of train events: at every flush, and each log_every steps since the one before.

    It flushes at looks, checkpoints and stops.
    """
    declared, train, ends = declared_looks(run.config), run.config["train"], run.of("end")
    looks, stops = ([event["step"] for event in run.of(kind)] for kind in ("val", "resume"))
    last = ends[-1]["step"] if ends and ends[-1]["status"] in ("done", "interrupted") else max(looks, default=0)
    last = min(last, train["steps"])
    saves = range(0, train["steps"], train["checkpoint_every"]) if train["checkpoint_every"] else ()
    windows = itertools.pairwise(sorted(step for step in {0, last, *stops, *saves, *declared} if 0 <= step <= last))
    return {step for low, high in windows for step in (*range(low, high, train["log_every"]), high)} - {0}


def check_logs(run: Events) -> Iterator[str]:
    if missing := declared_logs(run) - {event["step"] for event in run.of("train")}:
        yield f"no train event at steps where one is due: {sorted(missing)[:5]}"


def check_times(run: Events) -> Iterator[str]:
    looks, trains = run.of("val"), run.of("train")
    by_step = {event["step"]: event for event in looks}
    times = [by_step[step]["train_time_s"] for step in sorted(by_step)]
    if any(later <= earlier for earlier, later in itertools.pairwise(times)) or (times and times[0] < 0):
        yield "train_time_s does not rise from look to look"
    step_ms = [event["step_ms"] for event in trains]
    if len(step_ms) >= 3 and len(set(step_ms)) < len(step_ms) / 2:
        yield "step times repeat: no clock gives them"
    if any(not 0 <= event["optimizer_ms"] <= event["step_ms"] for event in trains):
        yield "optimizer_ms is not within step_ms"
    if not looks or not trains:
        return
    previous, windows = 0, []
    for event in trains:
        windows.append((event["step"], (event["step"] - previous) * event["step_ms"] / 1000))
        previous = event["step"]
    # Between two looks the clock sees the steps and little else.
    for early, late in itertools.pairwise(sorted(by_step)):
        inside = [seconds for step, seconds in windows if early < step <= late]
        elapsed = by_step[late]["train_time_s"] - by_step[early]["train_time_s"]
        if late in {step for step, _ in windows} and not 0.8 * elapsed - 0.05 <= sum(inside) <= 1.02 * elapsed + 0.01:
            yield f"steps {early} to {late} took {sum(inside):.3f} s by their step_ms, {elapsed:.3f} s by train_time_s"
    counts = run.start["params_by_role"]
    flop = 6 * (counts["matrix"] + counts["head"]) * run.config["train"]["batch_tokens"]
    floor_ms = 1000 * flop / max(map(peak_flops, (run.start, *run.of("resume"))))
    if min(step_ms) < floor_ms:
        yield f"a step of {min(step_ms):.4g} ms is below the {floor_ms:.4g} ms that its FLOP take at best"


def peak_flops(segment: dict[str, Any]) -> float:
    """Of all ranks of a run or resume event."""
    cores = segment["env"]["cpu_count"] if segment["device"] == "cpu" else 1
    return PEAK_FLOPS[segment["device"]] * segment["world_size"] * cores


def check_lr(run: Events) -> Iterator[str]:
    config, schedule = run.config, run.config["schedule"]
    peaks = {group["peak_lr"] for group in run.start["param_groups"]} | {run.start["hparams"]["lr"]}
    for event in run.of("train"):
        remaining = 1 - (event["step"] - 1) / config["train"]["steps"]
        cooldown, floor = schedule["cooldown_frac"], schedule["final_lr_frac"]
        scale = 1.0 if remaining >= cooldown else floor + (1 - floor) * remaining / cooldown
        scale *= min(1.0, event["step"] / max(1, config["warmup_steps"]))
        if not any(math.isclose(event["lr"], peak * scale, rel_tol=1e-6) for peak in peaks):
            yield f"step {event['step']}: lr {event['lr']} is not the schedule's"
            return


def check_losses(run: Events) -> Iterator[str]:
    config, looks = run.config, run.of("val")
    for event in looks:
        if not is_float32_sum(event["val_loss"], config["eval"]["tokens"], config["model"]["seq_len"]):
            yield f"step {event['step']}: val_loss {event['val_loss']} is no sum of float32 over the tokens: typed in"
            break
    untrained = math.log(config["model"]["vocab_size"])
    if looks and looks[0]["step"] == 0 and abs(looks[0]["val_loss"] - untrained) > UNTRAINED_TOLERANCE:
        yield f"step 0: val_loss {looks[0]['val_loss']} is not the {untrained:.4f} of an untrained model"
    # train_loss is a mean over the steps before a look; while it falls fast, the look is nearer to the mean after it,
    # or, where there is none, to what the fall so far lets expect.
    train_losses = {event["step"]: event["train_loss"] for event in run.of("train")}
    before = [looks[0]["val_loss"] if looks else untrained, *train_losses.values()]
    expected = [2 * now - earlier for earlier, now in itertools.pairwise(before)][-1:]
    lows = dict(zip(train_losses, [*before[2:], *expected], strict=True))
    for event in looks[1:]:
        near = train_losses.get(event["step"])
        # The mean over a first window in which losses rose above an untrained model's says nothing of its end.
        if near is None or (event["step"] == min(train_losses) and near > untrained):
            continue
        if event["val_loss"] < 0.75 * min(near, lows[event["step"]]) - 0.05:
            yield f"step {event['step']}: val_loss {event['val_loss']} is too far below train_loss {near}"


def is_float32_sum(mean: float, tokens: int, seq_len: int) -> bool:
    """Whether mean x tokens is a sum of float32 sums over whole sequences, as the trainer makes it."""
    if not 0 < mean < 1e3 or not 0 < tokens < 2**40:
        return False
    # A sequence's sum has 24 bits; its mean lies within a factor 64 of the overall one.
    grain = 2.0 ** (math.floor(math.log2(mean * seq_len / 64)) - 23)
    return round(mean * tokens / grain) * grain / tokens == mean


def check_end(run: Events) -> Iterator[str]:
    ends, looks = run.of("end"), {event["step"]: event for event in run.of("val")}
    if not ends:
        return
    end, target = ends[-1], run.config["eval"]["target"]
    order = [Validation(step, looks[step]["val_loss"], looks[step]["train_time_s"]) for step in sorted(looks)]
    hit, last = first_at_target(order, target), order[-1] if order else None
    expected = {
        "val_loss": last.val_loss if last else None,
        "reached_target": hit is not None,
        "steps_to_target": hit.step if hit else None,
        "time_to_target_s": hit.train_time_s if hit else None,
    }
    for key, value in expected.items():
        if end[key] != value:
            yield f"end event: {key} is {end[key]}, by the looks {value}"
    if end["status"] not in ("done", "diverged", "interrupted"):
        yield f"end event: unknown status {end['status']}"
    if end["status"] == "done" and last and end["train_time_s"] != last.train_time_s:
        yield f"end event: train_time_s is {end['train_time_s']}, at the last look {last.train_time_s}"
    if any(not 0 <= seconds < 1e9 for seconds in end["untimed"].values()):
        yield "end event: untimed seconds cannot be"
    spent_s = end["train_time_s"] + sum(end["untimed"].values())
    if "wall_s" not in end and any('"wall_s"' in text for text in run.start["sources"].values()):
        yield "end event lacks wall_s, which its code writes"
    elif not math.isclose(end.get("wall_s", spent_s), spent_s, rel_tol=1e-6):
        yield f"end event: wall_s is {end['wall_s']}, train_time_s and untimed add up to {spent_s}"
    # A process that was killed before it saved anything has the number of the one after it.
    resumed = sorted({event["segment"] for event in run.of("resume")})
    if resumed != list(range(2, 2 + len(resumed))) or end["segments"] != 1 + len(resumed):
        yield f"end event: {end['segments']} segments, the resumed ones are {resumed}"
    if not re.fullmatch("[0-9a-f]{64}", end.get("weights_sha256", "0" * 64)):
        yield "end event: weights_sha256 is no sha256"


def check_neurons(run: Events) -> Iterator[str]:
    model, looks, steps = run.config["model"], run.config["eval"], {event["step"] for event in run.of("val")}
    last, events = run.config["train"]["steps"], {event["step"]: event for event in run.of("neurons")}
    planned = {step for step in declared_looks(run.config) if step > 0 and (step % looks["every"] == 0 or step == last)}
    # A crash may have come between the two lines of the last look.
    certain = planned & (steps if run.of("end") else steps - {max(steps, default=0)})
    if not looks.get("telemetry", False):
        planned = certain = set()
    if not certain <= set(events) <= planned:
        yield f"neurons are not those of the declared steps: {sorted(certain ^ set(events))[:5]}"
    width, layers = model["mlp_expansion"] * model["model_dim"], range(model["num_layers"])
    kinds = ("gate", "up", "down") if model.get("mlp") == "swiglu" else ("up", "down")
    names = [f"blocks.{i}.mlp.{kind}" for i in layers for kind in kinds]
    for step, event in events.items():
        found, tall = event["matrices"], [name for name in names if not name.endswith("down")]
        if (event["width"], len(event["layers"]), sorted(found)) != (width, len(layers), sorted(names)):
            yield f"step {step}: neurons are not of the model in the config"
            continue
        sums = {key: sum(layer[key] for layer in event["layers"]) / (width * len(layers)) for key in ("dead", "silent")}
        for key in ("starved", "starved_momentum"):
            sums[key] = sum(found[name][key] for name in tall) / (width * len(tall))
        is_possible = [0 < event["tokens"] <= looks["tokens"], *(0 <= event[key] <= 1 for key in sums)]
        is_possible += [math.isclose(event[key], value, abs_tol=1e-9) for key, value in sums.items()]
        for layer in event["layers"]:
            is_possible += [0 <= layer["silent"] <= width, 0 <= (layer["still_dead"] or 0) <= layer["dead"] <= width]
        for matrix in found.values():
            low, high = matrix["update_quantiles"][0], matrix["update_quantiles"][-1]
            rank = matrix["effective_rank"]
            is_possible += [0 <= matrix[key] <= width for key in ("starved", "starved_momentum")]
            is_possible += [
                0 <= matrix["update_cv"] <= math.sqrt(width),
                0 <= rank <= 1.001 * min(width, model["model_dim"]),
            ]
            is_possible += [low == high == 0 or 0 <= low <= 1.001 and 0.999 <= high <= width]
            is_possible.append(matrix["update_quantiles"] == sorted(matrix["update_quantiles"]))
        if not all(is_possible):
            yield f"step {step}: numbers on neurons cannot be"


CHECKS = (
    *(check_order, check_identity, check_config, check_looks, check_logs, check_times, check_lr, check_losses),
    *(check_neurons, check_end),
)


# ----------------------------------------------------------------------------------------------------------------------
# A folder


def verify_folder(folder: Path) -> list[Verification]:
    """A verdict for each record below a folder, with what only the records together show."""
    verdicts, groups = [], {}
    by_losses: dict[tuple[float, ...], Path] = {}
    ended: set[Path] = set()
    for path in record_paths(folder):
        verdict, run = verify_events(path)
        verdicts.append(verdict)
        if run is None:
            continue
        ended |= {path} if run.of("end") else set()
        looks = tuple(event["val_loss"] for event in run.of("val"))
        twin = by_losses.setdefault(looks, path) if len(looks) > 1 else path
        if twin != path:
            # The same command gives the same losses again. In one folder they would count as two runs, if both ended.
            both_count = twin.parent == path.parent and {twin, path} <= ended
            together = verdict.reasons if both_count else verdict.notes
            together.append(f"repeats the losses of {twin.name}")
        start = run.start
        setting = json_hash(Run(path, start).setting)
        key = start["task_hash"], start["optimizer"], setting, start["code_hash"]
        groups.setdefault(key, []).append((start["seed"], verdict))
    for members in groups.values():
        seeds = sorted(seed for seed, _ in members)
        if missing := seed_gaps(seeds):
            for _, verdict in members:
                verdict.word_if_good = "gaps"
                verdict.notes.append(f"its group of seeds {seeds} lacks {missing}: run, and left out?")
    return verdicts
