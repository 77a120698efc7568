"""Run optimizers x seeds on one track and show who won.

    python scripts/compare.py                                       the laptop track, one seed an optimizer
    python scripts/compare.py --seeds 0 1 2 --out runs/quick
    python scripts/compare.py --config configs/gpt2_small.toml --nproc 8 --seeds 0 1 2 3

Each run is a process of its own. A run that has finished with the same arguments and the same code is not repeated, a
run that fails does not stop the others. Ends with the table and writes comparison.md and loss_curves.png to --out.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results.record import Run, by_optimizer, read_folder, read_sources

DEFAULT_OPTIMIZERS = ["adamw", "muon", "unormuon", "aurora"]
PREEMPTED = 75


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quick.toml", help="track (TOML)")
    parser.add_argument("--optimizers", nargs="+", default=DEFAULT_OPTIMIZERS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the records and the report")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=V", help="as train_gpt.py")
    parser.add_argument("--nproc", type=int, default=1, help="processes a run, under torchrun when more than 1")
    return parser.parse_args(argv)


def train_argv(args: argparse.Namespace, optimizer: str, seed: int) -> list[str]:
    """Arguments of train_gpt.py for one run, without --out."""
    argv = ["--config", args.config, "--optimizer", optimizer, "--seed", str(seed)]
    for override in args.overrides:
        argv += ["--set", override]
    return argv


def finished_run(runs: Sequence[Run], argv: list[str], nproc: int, sources: dict[str, str]) -> Run | None:
    """The newest finished run with these arguments that embeds these sources."""
    for run in reversed(runs):
        same_arguments = without_out(run.start["argv"][1:]) == argv and run.start["world_size"] == nproc
        if run.is_done and same_arguments and run.start["sources"] == sources:
            return run
    return None


def was_interrupted(runs: Sequence[Run], argv: list[str]) -> bool:
    """Whether the newest run with these arguments was stopped on request; torchrun hides the exit code."""
    ends = [run.end for run in runs if without_out(run.start["argv"][1:]) == argv]
    return bool(ends) and ends[-1] is not None and ends[-1]["status"] == "interrupted"


def without_out(argv: list[str]) -> list[str]:
    index = argv.index("--out") if "--out" in argv else len(argv)
    return argv[:index] + argv[index + 2 :]


def run_one(argv: list[str], out: Path, nproc: int) -> int:
    """Train in a child process, passing its lines on; returns its exit code."""
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [*launcher, "train_gpt.py", *argv, "--out", os.path.relpath(out, ROOT)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in child.stdout:
            print(f"    {line}", end="", flush=True)
        return child.wait()
    except KeyboardInterrupt:  # the child got it too and is saving what it has
        child.wait()
        return PREEMPTED


COLUMNS = (
    *("optimizer", "n", "val loss", "sd", "reached", "steps to target", "seconds to target"),
    *("optimizer ms/step", "training ms/step"),
)


def report(runs: Sequence[Run]) -> str:
    """The comparison as a Markdown table, lowest mean loss at the last step first."""
    groups = by_optimizer(runs)
    rows = [COLUMNS, *(row(name, groups[name]) for name in sorted(groups, key=lambda name: mean_loss(groups[name])))]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(COLUMNS))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def row(optimizer: str, group: Sequence[Run]) -> tuple[str, ...]:
    losses = [run.end["val_loss"] for run in group]
    hits = [hit for run in group if (hit := run.first_at_target())]
    if len(hits) == len(group):
        steps = f"{statistics.mean(hit.step for hit in hits):.0f}"
        seconds = f"{statistics.mean(hit.train_time_s for hit in hits):.1f}"
    else:  # a mean over the seeds that got there would flatter
        steps = f"> {statistics.mean(run.end['step'] for run in group):.0f}"
        seconds = f"> {statistics.mean(run.end['train_time_s'] for run in group):.1f}"
    return (
        optimizer,
        str(len(group)),
        f"{mean_loss(group):.4f}",
        f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
        f"{len(hits)}/{len(group)}",
        steps,
        seconds,
        f"{statistics.mean(run.mean_ms('optimizer_ms') for run in group):.1f}",
        f"{statistics.mean(run.mean_ms('step_ms') for run in group):.1f}",
    )


def mean_loss(group: Sequence[Run]) -> float:
    return statistics.mean(run.end["val_loss"] for run in group)


def verdict(runs: Sequence[Run]) -> str:
    """Who has the lowest mean loss, by how much, and whether so many seeds can tell it from the next."""
    groups = by_optimizer(runs)
    (best_loss, best), *others = sorted((mean_loss(group), name) for name, group in groups.items())
    text = f"Lowest validation loss at equal steps: {best}"
    if others:
        text += f", {others[0][0] - best_loss:.4f} below {others[0][1]}"
        first, second = ([run.end["val_loss"] for run in groups[name]] for name in (best, others[0][1]))
        if min(len(first), len(second)) > 1:
            text += f" ({welch_test(first, second)})"
    fewest = min(len(group) for group in groups.values())
    if fewest < 3:
        text += f". n = {fewest} is a lead, not evidence: add seeds with --seeds 0 1 2"
    return text + "."


def welch_test(first: Sequence[float], second: Sequence[float]) -> str:
    """Two-sided test of equal means that does not assume equal variances, in words."""
    try:
        from scipy.stats import ttest_ind
    except ImportError:
        return "no test: pip install scipy"
    p = ttest_ind(first, second, equal_var=False).pvalue
    return f"Welch's t-test: p = {p:.2g}{', no evidence of a difference' if p > 0.05 else ''}"


def main() -> int:
    args = parse_args()
    plan = [(optimizer, seed) for seed in args.seeds for optimizer in args.optimizers]
    try:
        sources = read_sources(ROOT / args.config)
    except OSError as error:
        print(f"error: config {args.config} cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    done: list[Run] = []
    failures: dict[str, int] = {}
    durations_s: list[float] = []
    for number, (optimizer, seed) in enumerate(plan, start=1):
        argv = train_argv(args, optimizer, seed)
        title = f"[{number}/{len(plan)}] {optimizer}, seed {seed}"
        if found := finished_run(read_folder(args.out)[0], argv, args.nproc, sources):
            print(f"{title}: finished before, {found.path}", flush=True)
            done.append(found)
            continue
        left_s = statistics.mean(durations_s) * (len(plan) - number + 1) if durations_s else None
        print(title + (f" (about {left_s / 60:.0f} min left for all runs)" if left_s else ""), flush=True)
        begin_s = time.monotonic()
        exit_code = run_one(argv, args.out.absolute(), args.nproc)
        durations_s.append(time.monotonic() - begin_s)
        if exit_code == PREEMPTED or was_interrupted(read_folder(args.out)[0], argv):
            print("stopped; the same command goes on with the runs that are left", file=sys.stderr)
            return PREEMPTED
        if found := finished_run(read_folder(args.out)[0], argv, args.nproc, sources):
            done.append(found)
        else:
            failures[f"{optimizer}, seed {seed}"] = exit_code
    for name, exit_code in failures.items():
        print(f"failed: {name}: exit code {exit_code}", file=sys.stderr)
    if not done:
        return max(failures.values())
    if len({run.start["task_hash"] for run in done}) > 1:
        print("error: the data changed between the runs, so they are not comparable; use a new --out", file=sys.stderr)
        return 1

    stacks = {tuple(run.start["env"][key] for key in ("device_name", "torch", "torch_threads")) for run in done}
    first = done[0].start
    text = (
        f"{args.config}: {first['config']['train']['steps']} steps, target {done[0].target:g}, "
        f"{first['world_size']} x {first['env']['device_name']}, torch {first['env']['torch']}\n\n"
        f"{report(done)}\n\n{verdict(done)}\n"
    )
    if len(stacks) > 1:
        text += f"Times are not comparable: the runs come from {len(stacks)} machines or stacks.\n"
    print("\n" + text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "comparison.md").write_text(text, encoding="utf-8")
    try:
        from scripts.plot import plot_loss_curves

        plot_loss_curves(done, args.out / "loss_curves.png")
        print(f"curves: {args.out / 'loss_curves.png'}")
    except ImportError as error:
        print(f"no curves: {error}; pip install matplotlib", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
