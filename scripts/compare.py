"""Run several optimizers and seeds on one track, and compare them with tests.

    python scripts/compare.py                                       the laptop track, one seed for each optimizer
    python scripts/compare.py torch.optim:SGD muon --seeds 0 1 2    any optimizer, by module:Class, against another
    python scripts/compare.py my_file:MyOpt muon --tune 16          first 16 trials for each that is not tuned yet
    python scripts/compare.py --seeds 0 1 2 3 4 --out runs/quick
    python scripts/compare.py --grid optimizer.lr=0.01,0.02,0.04    every value, for every optimizer
    python scripts/compare.py --config configs/gpt2_small.toml --nproc 8 --seeds 0 1 2 3
    python scripts/compare.py --jobs 2 --seeds 0 1 2                two runs at a time, half of the cores each
    python scripts/compare.py --plan --seeds 0 1 2                  the commands of these runs, for a job array
    python scripts/compare.py tune --help                           tuning, equally many trials for each optimizer
    python scripts/compare.py --report results/quick                the tables of runs that exist

Settings are checked before the first run. Each run is a process of its own. A run that has finished with the same
arguments and code is not repeated. A run that was stopped with a checkpoint in --out goes on from there. A run that
fails is reported and does not stop the others. Optimizers alternate within each seed, so that a machine that slows down
slows all alike (--no-interleave: one optimizer after the other). At the end the tables are printed, and comparison.md,
comparison.json, loss_curves.png and report.html are written to --out. scripts/README.md explains the tables.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.config import name_of
from aurora.console import run_script
from aurora.errors import HarnessError
from aurora.trainer.events import RecordError
from aurora.trainer.record import Run, read_folder, read_record
from scripts.analysis.text import cell, plain
from scripts.runs import (
    PREEMPTED,
    Outcome,
    Workers,
    by_arguments,
    check_jobs,
    check_settings,
    command_of,
    finished_run,
    key_of,
    overrides_of,
    take_folder,
    track_name,
)

MOST_REPORTED = 200  # of more runs the report takes longer than all else at the end, for each is verified
DEFAULT_OPTIMIZERS = ["adamw", "muon", "unormuon", "aurora"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=track_name, default="configs/quick.toml", help="track (TOML)")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="OPTIMIZER",
        help="names of the track's tables, or module:Class; default: adamw muon unormuon aurora",
    )
    parser.add_argument("--optimizers", nargs="+", metavar="OPTIMIZER", help="the same as an option")
    parser.add_argument(
        "--tune",
        type=int,
        metavar="N",
        help="first tune, with N trials each, the optimizers whose table is not marked as tuned, or that have none",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the records and the report")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=V", help="as in train_gpt.py"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="A.B=V,W",
        type=grid_values,
        help="run every value; optimizer.lr means the lr of each optimizer; several grids are combined",
    )
    parser.add_argument("--nproc", type=int, default=1, help="processes of each run, under torchrun if more than 1")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, each with 1/N of the cores and a GPU, if any"
    )
    parser.add_argument(
        "--interleave",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="alternate between optimizers (default)",
    )
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="FOLDER", help="run nothing; print the tables of these records"
    )
    parser.add_argument(
        "--plan", action="store_true", help="run nothing; print the command of each run that is left, one a line"
    )
    parser.add_argument(
        "--evaluate", type=Path, metavar="TEXT", help="add each optimizer's bits per byte on this text or shard"
    )
    parser.add_argument("--json", action="store_true", help="print JSON; progress goes to standard error")
    args = parser.parse_args(argv)
    if args.jobs < 1 or (args.jobs > 1 and args.nproc > 1):
        parser.error("--jobs must be at least 1, and 1 with --nproc above 1")
    if args.names and args.optimizers:
        parser.error("name the optimizers once: before all options, or with --optimizers")
    args.optimizers = args.names or args.optimizers or DEFAULT_OPTIMIZERS
    if args.tune is not None and (args.tune < 1 or args.report):
        parser.error("--tune must be at least 1, and is not for --report")
    if args.plan and (args.tune or args.report):
        parser.error("--plan prints the runs of a comparison; without --tune and --report")
    if args.tune and args.nproc > 1:
        parser.error("--tune makes its trials in one process each; without --nproc, or tune first: compare.py tune")
    args.tuned = {}  # "a.b=v" of each optimizer that is tuned here
    if args.evaluate and not args.evaluate.is_file():
        parser.error(f"--evaluate: no such file: {args.evaluate}")
    if args.nproc < 1:
        parser.error(f"--nproc must be at least 1, got {args.nproc}")
    for option in ("optimizers", "seeds"):
        names = getattr(args, option)
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            parser.error(f"--{option} has {', '.join(map(str, repeated))} more than once; each run is made once")
    return args


def grid_values(text: str) -> list[tuple[str, str]]:
    """ "a.b=1,2" as [("a.b", "1"), ("a.b", "2")]; commas within brackets belong to a value."""
    key, equals, values = text.partition("=")
    parts, depth = [""], 0
    for character in values:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if not equals or not all([key, *parts]):
        raise argparse.ArgumentTypeError(f"{text!r} must look like optimizer.lr=0.01,0.02")
    return [(key, part) for part in parts]


class Planned(NamedTuple):
    title: str
    argv: list[str]  # of train_gpt.py, without --out


def plan_runs(args: argparse.Namespace) -> list[Planned]:
    """All runs in the order in which they start."""
    plan = []
    for seed, setting, optimizer in itertools.product(args.seeds, itertools.product(*args.grid), args.optimizers):
        argv = ["--config", args.config, "--optimizer", optimizer, "--seed", str(seed)]
        table = f"optimizer.{name_of(optimizer)}."
        own = [(key.replace("optimizer.", table) if key.count(".") == 1 else key, value)
               for key, value in setting]  # fmt: skip
        tuned = args.tuned.get(optimizer, [])
        overrides = overrides_of(optimizer, args.overrides, args.optimizers)
        for override in [*overrides, *tuned, *(f"{key}={value}" for key, value in own)]:
            argv += ["--set", override]
        title = ", ".join([optimizer, *(f"{key} {value}" for key, value in setting), f"seed {seed}"])
        plan.append(Planned(title, argv))
    if not args.interleave:
        plan.sort(key=lambda planned: args.optimizers.index(planned.argv[3]))
    return plan


def run_all(
    args: argparse.Namespace, plan: Sequence[Planned], finished: Mapping[str, Run], progress: TextIO
) -> list[Outcome]:
    """The planned runs, --jobs at a time, in the order of the plan. None starts after one was stopped on request.

    finished: those that had finished before, by their key_of().
    """
    workers, is_stopped = Workers(args.jobs, args.out), threading.Event()
    durations_s: list[float] = []
    workers.hear_signals()

    def run_planned(number: int, title: str, argv: list[str]) -> Outcome:
        if is_stopped.is_set():
            return Outcome(None, PREEMPTED)
        place = f"[{number}/{len(plan)}]"
        if found := finished.get(key_of(argv)) or finished_run(workers.records(), argv, args.nproc):
            say(f"{place} {title}: finished before, {found.path}")
            return Outcome(found, 0)
        left_s = statistics.mean(durations_s) * (len(plan) - number + 1) / args.jobs if durations_s else None
        say(f"{place} {title}" + (f" (about {left_s / 60:.0f} min left for all runs)" if left_s else ""))
        begin_s = time.monotonic()
        prefix = f"    {place} " if args.jobs > 1 else "    "
        try:
            outcome = workers.train(argv, args.nproc, progress, prefix)
        except HarnessError as error:
            say(f"{prefix}error: {error}")
            return Outcome(None, int(error.reason))
        durations_s.append(time.monotonic() - begin_s)
        if outcome.exit_code == PREEMPTED:
            is_stopped.set()
        elif outcome.run and outcome.run.is_done:
            return Outcome(outcome.run, 0)
        return outcome

    def say(text: str) -> None:
        progress.write(f"{text}\n")
        progress.flush()

    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run_planned, number, *planned) for number, planned in enumerate(plan, start=1)]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:  # the runs got it too and are saving what they have
            is_stopped.set()
            return [Outcome(None, PREEMPTED)]


def report_runs(args: argparse.Namespace, runs: Sequence[Run], failures: dict[str, int]) -> str:
    """The tables of all tasks in Markdown; writes them and the curves to --out unless only asked to report."""
    from scripts.analysis.report import as_json, markdown_report
    from scripts.analysis.verdict import group_runs

    evaluated = None
    if args.evaluate:
        from scripts.models.several import evaluate_each  # and with it torch, which takes seconds

        evaluated = evaluate_each(runs, args.evaluate)
    tasks = group_runs(runs)
    tables = {task_hash: as_json(groups) for task_hash, groups in tasks.items()}

    def make_text(escape: Callable[..., str]) -> str:
        text = ""
        for groups in tasks.values():
            first = groups[0].runs[0]
            track = next((name for name in first.start["sources"] if name.endswith(".toml")), args.config)
            machines = sorted({f"{run.start['world_size']} x {run.start['env']['device_name']}" for run in runs})
            lengths = ", ".join(map(str, sorted({group.planned_steps for group in groups})))
            text += (
                f"{escape(track)}: {lengths} steps, target {first.target:g}, "
                f"{escape(', '.join(machines))}, torch {escape(first.start['env']['torch'])}\n\n"
                f"{markdown_report(groups, escape)}\n"
            )
        if len(tasks) > 1:
            text += "Not comparable with each other: runs of different data, model, batch, evaluation or target.\n"
        text += f"\n{evaluated.text(escape)}\n" if evaluated else ""
        return text + "".join(f"failed: {title}: exit code {code}\n" for title, code in failures.items())

    evaluation = {"evaluation": evaluated.as_json()} if evaluated else {}
    data = json.dumps({"tasks": tables, "failures": failures} | evaluation, indent=1)
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "comparison.md").write_text(make_text(cell), encoding="utf-8")
        (args.out / "comparison.json").write_text(data + "\n", encoding="utf-8")
    return data if args.json else make_text(plain)


def main() -> int:
    if sys.argv[1:2] == ["tune"]:
        from scripts.tune import main as tune

        return tune(sys.argv[2:])
    args = parse_args()
    try:
        import scripts.analysis.report  # noqa: F401  before hours of runs
    except ImportError as error:
        print(f"error: {error}; pip install -e '.[report]'", file=sys.stderr)
        return 2
    if args.report:
        return report_folders(args)
    progress = sys.stderr if args.json else sys.stdout
    if args.tune:
        from scripts.tune import tune_first

        try:
            check_settings([argv for _, argv in plan_runs(args)], args.nproc)  # before hours of trials
        except HarnessError as error:
            print(f"error: {error}", file=sys.stderr)
            return int(error.reason)
        args.tuned, code = tune_first(args, progress)
        if code:
            return code
    plan = plan_runs(args)
    try:
        recorded = by_arguments(read_folder(args.out, condensed=True)[0])
        keys = {key_of(argv): argv for _, argv in plan}
        found = {key: finished_run(recorded.get(key, []), argv, args.nproc) for key, argv in keys.items()}
        finished = {key: run for key, run in found.items() if run}
        check_settings([argv for key, argv in keys.items() if key not in finished], args.nproc)
        if args.plan:
            for key, argv in keys.items():
                if key not in finished:
                    print(command_of(argv, args.out, args.nproc))
            return 0
        check_jobs(args.jobs)
        folder = take_folder(args.out)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.reason)
    with folder:
        return run_and_report(args, plan, finished, progress)


def run_and_report(
    args: argparse.Namespace, plan: Sequence[Planned], finished: Mapping[str, Run], progress: TextIO
) -> int:
    outcomes = run_all(args, plan, finished, progress)
    if any(outcome.exit_code == PREEMPTED for outcome in outcomes):
        print("stopped; the same command goes on with the runs that are left", file=sys.stderr)
        return PREEMPTED
    done = [outcome.run for outcome in outcomes if outcome.run]
    failures = {planned.title: outcome.exit_code for planned, outcome in zip(plan, outcomes, strict=True)
                if outcome.exit_code or not outcome.run}  # fmt: skip
    for title, exit_code in failures.items():
        print(f"failed: {title}: exit code {exit_code}", file=sys.stderr)
    if not any(run.is_done for run in done):
        return max(failures.values())

    print("\n" + report_runs(args, done, failures), flush=True)
    from scripts.analysis.verdict import by_task

    num_tasks = len(by_task(done))
    if num_tasks == 1:
        try:
            from scripts.plot import plot_loss_curves

            plot_loss_curves(done, args.out / "loss_curves.png")
            print(f"curves: {args.out / 'loss_curves.png'}", file=progress)
        except ImportError as error:
            print(f"no curves: {error}; pip install -e '.[report]'", file=sys.stderr)
        except (OSError, ValueError) as error:
            print(f"no curves: {error}", file=sys.stderr)
    if len(done) > MOST_REPORTED:
        print(f"report: {shlex.join(['python', 'scripts/report.py', str(args.out)])}", file=progress)
        return 1 if failures or num_tasks > 1 and not args.grid else 0
    try:
        from scripts.report import write_report

        write_report([read_record(run.path) for run in done], args.out / "report.html")
        print(f"report: {args.out / 'report.html'}", file=progress)
    except (OSError, RecordError) as error:
        print(f"no report: {error}", file=sys.stderr)
    return 1 if failures or num_tasks > 1 and not args.grid else 0


def report_folders(args: argparse.Namespace) -> int:
    runs, errors = read_folder(*args.report, condensed=True)
    for error in errors:
        print(f"warning: {error}", file=sys.stderr)
    if not runs:
        print(f"error: no record in {', '.join(map(str, args.report))}", file=sys.stderr)
        return 2
    print(report_runs(args, runs, {}))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
