"""Plots of run records.

python scripts/plot.py results/quick --out curves.png
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from results.record import Run, by_optimizer, read_folder

# Okabe and Ito's palette, told apart by colour-blind readers; line styles tell them apart in grey print.
STYLES = {
    "adamw": ("#000000", ":"),
    "muon": ("#0072B2", "-."),
    "normuon": ("#CC79A7", (0, (3, 1, 1, 1))),
    "unormuon": ("#009E73", "--"),
    "aurora": ("#D55E00", "-"),
}
# Curves begin here: the fall from the loss of a uniform guess would squeeze everything else.
SHOWN_FROM_FRAC = 0.2


def plot_loss_curves(runs: Sequence[Run], path: Path) -> None:
    """Validation loss against steps and against timed seconds: the seeds' mean, and their range as a band.

    Seconds are shown at the mean time of each step. Writes PNG or SVG, by the suffix of path.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for optimizer, group in by_optimizer(runs).items():
        looks_by_step = [dict((look.step, look) for look in run.validations) for run in group]
        steps = sorted(set.intersection(*(set(looks) for looks in looks_by_step)))
        steps = [step for step in steps if step >= SHOWN_FROM_FRAC * max(steps)]
        losses = [[looks[step].val_loss for looks in looks_by_step] for step in steps]
        seconds = [statistics.mean(looks[step].train_time_s for looks in looks_by_step) for step in steps]
        color, style = STYLES.get(optimizer, ("#56B4E9", "-"))
        for axis, x in zip(axes, (steps, seconds), strict=True):
            axis.fill_between(x, [min(row) for row in losses], [max(row) for row in losses], color=color, alpha=0.15)
            label = f"{optimizer} (n = {len(group)})"
            axis.plot(x, [statistics.mean(row) for row in losses], color=color, linestyle=style, label=label)
    for axis, label in zip(axes, ("steps", "timed training seconds"), strict=True):
        axis.axhline(runs[0].target, color="0.5", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].annotate(
        f"target {runs[0].target:g}", (0.01, runs[0].target), xycoords=("axes fraction", "data"), va="bottom"
    )
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[1].legend()
    first = runs[0].start
    train, machine = first["config"]["train"], f"{first['world_size']} x {first['env']['device_name']}"
    figure.suptitle(f"{train['steps']} steps of {train['batch_tokens']:,} tokens on {machine}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="records of one task")
    parser.add_argument("--out", type=Path, required=True, help="PNG or SVG to write")
    args = parser.parse_args()
    runs, errors = read_folder(args.folder)
    runs = [run for run in runs if run.is_done]
    for error in errors:
        print(f"warning: {error}", file=sys.stderr)
    tasks = {run.start["task_hash"] for run in runs}
    if len(tasks) != 1:
        print(f"error: {args.folder} must hold finished runs of one task, found {len(tasks)} tasks", file=sys.stderr)
        return 2
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        plot_loss_curves(runs, args.out)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture
        print(f"error: {args.out} cannot be written: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
