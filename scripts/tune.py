"""Tune optimizers with equally many trials each: the command `python scripts/compare.py tune`.

    python scripts/compare.py tune --trials 20 --jobs 2 --out runs/quick_tuning
    python scripts/compare.py tune --trials 20 --jobs 2 --out runs/quick_tuning --write
    python scripts/compare.py tune --set model.mlp=swiglu --out runs/quick_swiglu_tuning
    python scripts/compare.py tune --optimizers torch.optim:SGD my_file:MyOpt --out runs/mine_tuning

The search is that of scripts/analysis/tuning.py, in the space that --space declares. An optimizer of which that says
nothing has its lr and AdamW's searched, on grids of factor 2 around what it would have untuned. Each trial is an
ordinary run with a record in --out. A trial that diverged counts, with an infinite loss. The same command goes on where
it was stopped: a trial whose arguments, config and code have a record is not run again. ledger.json (one trial a line)
and tuning.md are written to --out. Optimizers that are not searched this time keep their lines there.
"""

import argparse
import json
import math
import shlex
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from aurora.config import ROOT, is_path, load_config, name_of, recorded, told_hparams
from aurora.errors import Exit, HarnessError
from aurora.trainer.record import Run
from scripts.analysis.text import markdown_table
from scripts.analysis.tuning import (
    Search,
    Space,
    Trial,
    best_of,
    default_knobs,
    is_finite,
    neighbours_tried,
    read_space,
    tuned_trials,
    write_setting,
)
from scripts.runs import (
    PREEMPTED,
    Workers,
    check_jobs,
    check_settings,
    has_arguments,
    is_current,
    overrides_of,
    take_folder,
    track_name,
)

LEDGER, PAGE = "ledger.json", "tuning.md"
# Where no file declares a space: a seed that no comparison uses, and only the loss at the end, which alone counts.
DEFAULT_SEED, DEFAULT_OVERRIDES = 100, ("eval.every=1000000", "eval.late_every=1000000")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare.py tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=track_name, default="configs/quick.toml", help="track (TOML)")
    parser.add_argument("--space", type=Path, help="search space (default: configs/tuning/<name of the track>.toml)")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="OPTIMIZER",
        help="as of compare.py; default: all of the search space",
    )
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="trials of each optimizer (20)")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="optimizers at a time, each with 1/N of the cores"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quick_tuning"), help="folder of the records and the ledger"
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=V", help="as in train_gpt.py"
    )
    parser.add_argument("--write", action="store_true", help="at the end, write the chosen values into the track")
    args = parser.parse_args(argv)
    if args.trials < 1 or args.jobs < 1:
        parser.error("--trials and --jobs must be at least 1")
    if args.write and args.overrides:
        parser.error("--write takes values into the track, so they must be found on it: without --set")
    args.space = args.space or ROOT / "configs/tuning" / Path(args.config).name
    return args


class Stopped(Exception):
    """The exit code of a trial that neither finished nor diverged."""


class Ledger:
    """All trials so far, one a line, rewritten after each: {optimizer, trial, knob, value, setting, why, ...}."""

    def __init__(self, path: Path, searched: Sequence[str]):
        """searched: optimizers whose lines are made anew; those of others stay. Raises HarnessError."""
        self.path, self.entries, self.lock = path, [], threading.Lock()
        try:
            entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
            self.entries = [entry for entry in entries if entry["optimizer"] not in searched]
            for optimizer in {entry["optimizer"] for entry in self.entries}:
                self.trials(optimizer)
        except (ValueError, KeyError, TypeError) as error:
            message = (
                f"{path} is not a list of trials ({error!r}); move it away, trials that have a record are not run again"
            )
            raise HarnessError(Exit.CONFIG, message) from error

    def add(self, entry: dict[str, Any]) -> None:
        with self.lock:
            self.entries.append(entry)
            self.entries.sort(key=lambda e: (e["optimizer"], e["trial"]))
            text = "[\n" + ",\n".join(map(json.dumps, self.entries)) + "\n]\n"
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path)

    def trials(self, optimizer: str) -> list[Trial]:
        own = [entry for entry in self.entries if entry["optimizer"] == optimizer]
        losses = [math.inf if entry["val_loss"] is None else entry["val_loss"] for entry in own]
        return [
            Trial(entry["trial"], entry["knob"], entry["setting"], entry["why"], loss)
            for entry, loss in zip(own, losses, strict=True)
        ]


class Tuner:
    """The trials of all optimizers: run, or found again among the records."""

    def __init__(self, args: argparse.Namespace, space: Space, ledger: Ledger, progress: TextIO):
        self.args, self.space, self.ledger, self.progress = args, space, ledger, progress
        self.workers = Workers(args.jobs, args.out)
        self.workers.hear_signals()
        self.is_stopped = threading.Event()

    def search(self, optimizer: str) -> Search:
        """All trials of one optimizer. Raises Stopped."""
        knobs = self.space.knobs[optimizer]
        searched = "; ".join(map(str, knobs))

        def evaluate(number: int, knob: str, setting: dict[str, Any], why: str) -> float:
            argv = self.argv(optimizer, setting)
            place = f"[{optimizer} {number}/{self.args.trials}]"
            run, is_found = self.find(argv), True
            if run is None:
                self.say(f"{place} {why}: {as_words(setting)}")
                run, is_found = self.train(argv, place), False
            loss = run.end_event["val_loss"] if run.is_done else math.inf
            self.say(f"{place} {'found' if is_found else 'done'}: {run.end_event['status']}, val_loss {loss:.5f}")
            self.ledger.add({
                "optimizer": optimizer, "trial": number, "knob": knob, "value": setting[knob], "setting": setting,
                "why": why, "status": run.end_event["status"], "val_loss": loss if is_finite(loss) else None,
                "record": run.path.name, "space": searched,
            })  # fmt: skip
            return loss

        search = Search(knobs, self.args.trials, evaluate)
        search.run()
        return search

    def argv(self, optimizer: str, setting: dict[str, Any]) -> list[str]:
        """Of train_gpt.py, without --out."""
        argv = ["--config", self.args.config, "--optimizer", optimizer, "--seed", str(self.space.seed)]
        argv += ["--set", "train.save_model=false"]  # of a hundred trials only the settings go on
        values = keys_of(self.space, optimizer, setting)
        own = as_overrides(optimizer, values)
        overrides = overrides_of(optimizer, self.args.overrides, self.space.knobs)
        return argv + [word for override in (*self.space.overrides, *overrides, *own)
                       for word in ("--set", override)]  # fmt: skip

    def train(self, argv: list[str], place: str) -> Run:
        if self.is_stopped.is_set():
            raise Stopped(PREEMPTED)
        outcome = self.workers.train(argv, 1, self.progress, f"    {place} ")
        if outcome.run is None or not is_over(outcome.run):
            self.is_stopped.set()
            raise Stopped(outcome.exit_code or 1)
        return outcome.run

    def find(self, argv: list[str]) -> Run | None:
        """The newest run with these arguments, this config and the current code that finished or diverged."""
        config = load_config(ROOT / self.args.config, argv[3], argv[argv.index("--set") + 1 :: 2])
        wanted = as_read(recorded(config))
        for run in reversed(self.workers.records()):
            is_same = has_arguments(run, argv) and as_read(run.start["config"]) == wanted
            if is_over(run) and is_same and is_current(run):
                return run
        return None

    def say(self, text: str) -> None:
        self.progress.write(f"{text}\n")
        self.progress.flush()


def as_overrides(optimizer: str, values: dict[str, Any]) -> list[str]:
    """ "a.b=v" for values of an optimizer's table."""
    return [f"optimizer.{name_of(optimizer)}.{key}={json.dumps(value)}" for key, value in values.items()]


def is_over(run: Run) -> bool:
    return run.end is not None and run.end["status"] in ("done", "diverged")


def as_read(config: dict[str, Any]) -> dict[str, Any]:
    """A config in which 1 and 1.0 are the same, whoever has read it."""
    return json.loads(json.dumps(config), parse_int=float)


def keys_of(space: Space, optimizer: str, setting: dict[str, Any]) -> dict[str, Any]:
    """The values of the optimizer's table that a setting of knobs means."""
    return {key: setting[knob.name] for knob in space.knobs[optimizer] for key in knob.keys}


def report(ledger: Ledger, space: Space, args: argparse.Namespace) -> str:
    """What was chosen and why, and every trial, in Markdown."""
    chosen, rows = [], []
    searched = {entry["optimizer"]: True for entry in ledger.entries}
    for optimizer in [*filter(searched.get, space.knobs), *(name for name in searched if name not in space.knobs)]:
        trials = ledger.trials(optimizer)
        first = next(iter(trials[0].setting))  # the knob that is tuned first
        best = best_of(trials)
        around = [
            f"{t.setting[first]:g}: {as_loss(t.val_loss)}" if t else "not tried"
            for t in neighbours_tried(trials, first)
        ]
        diverged = sum(not is_finite(trial.val_loss) for trial in trials)
        chosen.append(
            (optimizer, str(len(trials)), str(diverged), as_words(best.setting), as_loss(best.val_loss), *around)
        )
        for trial in trials:
            loss = as_loss(trial.val_loss) + (" (chosen)" if trial is best else "")
            rows.append((optimizer, str(trial.number), trial.why, trial.knob, as_words(trial.setting), loss))
    header = ("optimizer", "trials", "diverged", "chosen", "val loss", "next lower lr: loss", "next higher lr: loss")
    words = ["python", "scripts/compare.py", "tune", "--config", args.config, "--trials", str(args.trials)]
    command = shlex.join([*words, *(word for override in args.overrides for word in ("--set", override))])
    return (
        f"Made by `{command}` (search space `{args.space.name}`, one seed that no comparison uses).\n\n"
        + markdown_table(header, chosen)
        + "\n\n"
        + markdown_table(("optimizer", "trial", "why", "knob", "setting", "val loss"), rows)
        + "\n"
    )


def as_words(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def as_loss(loss: float) -> str:
    return f"{loss:.5f}" if is_finite(loss) else "diverged"


def write_track(path: Path, space: Space, searches: dict[str, Search], out: Path) -> None:
    """The chosen values into the track's tables, all or none."""
    text = path.read_text(encoding="utf-8")
    for optimizer, search in searches.items():
        values = keys_of(space, optimizer, search.best.setting)
        text = write_setting(text, optimizer, values, f"{len(search.trials)} trials, {out.as_posix()}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    try:
        for optimizer, search in searches.items():
            config = load_config(temporary, optimizer)
            found = told_hparams(vars(config))
            assert all(found[key] == value for key, value in keys_of(space, optimizer, search.best.setting).items())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def declared_space(args: argparse.Namespace) -> Space:
    """The space of --space, with the default knobs of those --optimizers of which it says nothing. HarnessError."""
    if args.space.is_file():
        space = read_space(args.space)
    elif args.optimizers:
        space = Space(DEFAULT_SEED, list(DEFAULT_OVERRIDES), {})
    else:
        track = f"configs/tuning/ has none for {args.config}"
        message = f"there is no search space {args.space}: {track}; write one, or name --optimizers"
        raise HarnessError(Exit.CONFIG, message)
    own = {}
    for optimizer in args.optimizers or space.knobs:
        knobs = space.knobs.get(name_of(optimizer))
        if knobs is None:
            overrides = overrides_of(optimizer, args.overrides, args.optimizers)
            config = load_config(ROOT / args.config, optimizer, [*space.overrides, *overrides])
            from aurora.trainer.optimizers import checked_hparams  # and with it torch

            knobs = default_knobs(checked_hparams(config))
        own[optimizer] = knobs
    return space._replace(knobs=own)


def search_all(args: argparse.Namespace, progress: TextIO) -> tuple[dict[str, Search], Space]:
    """The trials of all optimizers, and where they were made. Writes the ledger and the page.

    Raises:
        HarnessError: usage, or a folder that is not ours.
        Stopped: a trial neither finished nor diverged.
    """
    space = declared_space(args)
    optimizers = list(space.knobs)
    if args.write and (apart := [name for name in optimizers if is_path(name)]):
        message = f"--write: {apart[0]} has no table in {args.config} to write to; add one with rule = {apart[0]!r}"
        raise HarnessError(Exit.CONFIG, message)
    check_jobs(args.jobs)
    with take_folder(args.out):
        ledger = Ledger(args.out / LEDGER, optimizers)
        tuner = Tuner(args, space, ledger, progress)
        starts = ({knob.name: knob.start for knob in space.knobs[optimizer]} for optimizer in optimizers)
        check_settings((tuner.argv(*start) for start in zip(optimizers, starts, strict=True)), nproc=1)
        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                futures = {optimizer: pool.submit(tuner.search, optimizer) for optimizer in optimizers}
                searches = {optimizer: future.result() for optimizer, future in futures.items()}
            except HarnessError:
                tuner.is_stopped.set()
                raise
            except KeyboardInterrupt:  # the runs got it too
                tuner.is_stopped.set()
                raise Stopped(PREEMPTED) from None
        (args.out / PAGE).write_text(report(ledger, space, args), encoding="utf-8")
    return searches, space


def tune_first(args: argparse.Namespace, progress: TextIO) -> tuple[dict[str, list[str]], int]:
    """For compare.py --tune: "a.b=v" of each optimizer that was not tuned before, from args.tune trials; exit code."""
    trials = tuned_trials((ROOT / args.config).read_text(encoding="utf-8"))
    untuned = [optimizer for optimizer in args.optimizers if is_path(optimizer) or optimizer not in trials]
    for optimizer in args.optimizers:
        if optimizer not in untuned and trials[optimizer] != args.tune:
            progress.write(f"{optimizer} is tuned, with {trials[optimizer]} trials; those below get {args.tune}\n")
    if not untuned:
        progress.write("all of them are tuned already\n")
        return {}, 0
    words = ["--config", args.config, "--trials", str(args.tune), "--jobs", str(args.jobs), "--optimizers", *untuned]
    words += ["--out", f"{args.out}_tuning", *(word for value in args.overrides for word in ("--set", value))]
    try:
        searches, space = search_all(parse_args(words), progress)
    except (HarnessError, OSError, ValueError, Stopped) as error:
        return {}, told(error)
    chosen = {}
    for optimizer, search in searches.items():
        if not is_finite(search.best.val_loss):
            print(
                f"error: every trial of {optimizer} diverged; name a lower optimizer.NAME.lr by --set", file=sys.stderr
            )
            return {}, 1
        chosen[optimizer] = as_overrides(optimizer, keys_of(space, optimizer, search.best.setting))
        progress.write(f"{optimizer}: {' '.join(chosen[optimizer])}\n")
    return chosen, 0


def told(error: Exception) -> int:
    """Say why the search ended; the exit code."""
    if isinstance(error, Stopped):
        words = "stopped" if error.args[0] == PREEMPTED else f"error: a trial ended with exit code {error.args[0]}"
        print(f"{words}; the same command goes on with the trials that are left", file=sys.stderr)
        return int(error.args[0])
    print(f"error: {error}", file=sys.stderr)
    return int(error.reason) if isinstance(error, HarnessError) else 2


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    try:
        searches, space = search_all(args, sys.stdout)
        if args.write:
            if lost := [optimizer for optimizer, search in searches.items() if not is_finite(search.best.val_loss)]:
                print(f"error: every trial of {', '.join(lost)} diverged; nothing is written", file=sys.stderr)
                return 1
            write_track(ROOT / args.config, space, searches, args.out)
    except (HarnessError, OSError, ValueError, Stopped) as error:
        return told(error)
    print("\n" + (args.out / PAGE).read_text(encoding="utf-8"))
    return 0
