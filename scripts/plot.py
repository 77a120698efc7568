"""Plot records: loss against steps and seconds, the neighbourhood of the target, steps to the target.

python scripts/plot.py results/quick --out curves.png
python scripts/plot.py neurons results/quick --out neurons.svg      starved and dead neurons, see scripts/neurons.py
python scripts/plot.py neurons results/quick --steps 100 200        the same at these steps, as a table
python scripts/plot.py leverage results/quick --out leverage.svg    histograms of the rows' leverage over training
"""

import argparse
import io
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aurora.console import run_script
from aurora.trainer.record import Run, read_folder
from scripts.analysis.text import plain

try:
    from scripts.analysis.report import to_target
    from scripts.analysis.verdict import Group, by_task, group_runs, mean_curve
except ImportError as error:
    print(f"error: {error}; pip install -e '.[report]'", file=sys.stderr)
    sys.exit(2)

Style = tuple[str, Any, str]  # colour, line style and marker, as matplotlib names them
# Okabe and Ito's palette, told apart by colour-blind readers; line styles and markers tell them apart in grey print.
STYLES: dict[str, Style] = {
    "adamw": ("#000000", ":", "o"),
    "muon": ("#0072B2", "-.", "s"),
    "normuon": ("#CC79A7", (0, (3, 1, 1, 1)), "v"),
    "unormuon": ("#009E73", "--", "^"),
    "aurora": ("#D55E00", "-", "D"),
    "riemannian_aurora": ("#56B4E9", (0, (5, 1)), "P"),
}
# For a second setting of the same optimizer, and for optimizers without a style of their own.
SPARE_STYLES: list[Style] = [
    ("#E69F00", (0, (1, 1)), "X"),
    ("#56B4E9", (0, (5, 1)), "P"),
    ("#CC79A7", (0, (3, 1, 1, 1)), "v"),
]
# Curves begin here: the fall from the loss of a uniform guess would squeeze everything else.
SHOWN_FROM_FRAC = 0.2
# Markers of one curve; every curve begins with another offset, so that they do not cover each other.
MARKERS = 6
MOST_CURVES = 8  # with a name and a bar of their own: the first at the target
MOST_OTHERS = 500
LABEL_WIDTH = 26
DPI = 120


def plot_loss_curves(runs: Sequence[Run], path: Path) -> None:
    """Plot the runs of one task, grouped by optimizer and setting; see plot_groups."""
    (groups,) = group_runs(runs).values()
    plot_groups(groups, path)


def plot_groups(groups: Sequence[Group], path: Path, description: str = "") -> None:
    """Four panels: validation loss against steps and against timed seconds, its end, and steps to the target.

    Curves are the seeds' mean with their range as a band, at the steps that all seeds reached, and seconds the mean
    time of each step. The same runs give the same bytes.

    Args:
        groups: of one task; each needs a validation at a common step.
        path: PNG or SVG, by its suffix.
        description: kept in the file's metadata.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = styles_of(groups[:MOST_CURVES])
    shown, others = groups[:MOST_CURVES], groups[MOST_CURVES:]
    # Names come from records: no $mathematics$ in them, and no date or random name in the file.
    settings = {"text.parse_math": False, "svg.hashsalt": "", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
        by_steps, by_seconds, near_target, bars = axes.flat
        for axis in (by_steps, by_seconds, near_target):
            draw_others(axis, others, is_time=axis is by_seconds)
            draw_curves(axis, shown, styles, is_time=axis is by_seconds)
        target = groups[0].runs[0].target
        near_target.set_title("near the target")
        near_target.set(**zoom(shown, target))
        for axis in (by_steps, by_seconds, near_target):
            axis.axhline(target, color="0.35", linewidth=1)
            axis.annotate(
                *(f"target {target:g}", (0.01, target)), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )  # fmt: skip
            axis.set_ylabel("validation loss (nats per token)")
            axis.grid(alpha=0.3)
        if by_steps.lines[:-1] or others:  # besides the target
            by_steps.legend()
        draw_steps_to_target(bars, shown, styles)
        first = groups[0].runs[0].start
        lengths = ", ".join(map(str, sorted({group.planned_steps for group in groups})))
        train, machine = first["config"]["train"], f"{first['world_size']} x {printable(first['env']['device_name'])}"
        figure.suptitle(f"{lengths} steps of {train['batch_tokens']:,} tokens on {machine}")
        save_figure(figure, path, description)
        plt.close(figure)


def save_figure(figure, path: Path, description: str = "") -> None:
    """As PNG or SVG, without a date. A PNG gets a palette of 256 colours: a third of the bytes, no visible loss."""
    if path.suffix != ".png":
        figure.savefig(path, dpi=DPI, metadata={"Description": description, "Date": None})
        return
    from PIL import Image, PngImagePlugin

    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(buffer, format="png", dpi=DPI)
    info.add_text("Description", description)
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, format="png", optimize=True, pnginfo=info)


def styles_of(groups: Sequence[Group]) -> list[Style]:
    return styles_by_name([group.optimizer for group in groups])


def styles_by_name(optimizers: Sequence[str]) -> list[Style]:
    """Of each its own, where another has not taken that, else the least used spare one."""
    own = [STYLES.get(optimizer) for optimizer in optimizers]
    free = [style if style not in own[:i] else None for i, style in enumerate(own)]
    used, styles = [style for style in free if style], []
    for style in free:
        if style is None:
            style = min(SPARE_STYLES, key=used.count)
            used.append(style)
        styles.append(style)
    return styles


def printable(text: object) -> str:
    """Text of a record without control characters, cut and wrapped."""
    return "\n".join(textwrap.wrap(plain(text, limit=120), LABEL_WIDTH))


def draw_curves(axis, groups: Sequence[Group], styles: Sequence[tuple], is_time: bool) -> None:
    for index, (group, (color, line, marker)) in enumerate(zip(groups, styles, strict=True)):
        points = mean_curve(group)
        points = [point for point in points if point.step >= SHOWN_FROM_FRAC * points[-1].step]
        if not points:
            continue
        x = [point.seconds if is_time else point.step for point in points]
        every = max(1, len(points) // MARKERS)
        band = [point.low for point in points], [point.high for point in points]
        axis.fill_between(x, *band, color=color, alpha=0.15, lw=0)
        axis.plot(
            *(x, [point.mean for point in points]),
            color=color,
            linestyle=line,
            marker=marker,
            markersize=4.5,
            markevery=(index * every // max(1, len(groups)), every),
            label=f"{printable(group.label)} (n = {len(group.runs)})",
        )
    axis.set_xlabel("timed training seconds" if is_time else "steps")


def draw_others(axis, groups: Sequence[Group], is_time: bool) -> None:
    """One thin grey curve a group, of its first finished run: how far behind the shown ones the others are."""
    lines = []
    for group in groups[:MOST_OTHERS]:
        run = next((run for run in group.runs if run.is_done), group.runs[0])
        last_step = max((validation.step for validation in run.validations), default=0)
        points = [v for v in run.validations if v.step >= SHOWN_FROM_FRAC * last_step]
        lines.append([(point.train_time_s if is_time else point.step, point.val_loss) for point in points])
    if lines:
        from matplotlib.collections import LineCollection

        label = f"{len(groups)} others" + f", {MOST_OTHERS} of them shown" * (len(groups) > MOST_OTHERS)
        axis.add_collection(LineCollection(lines, colors="0.8", linewidths=0.5, label=label, zorder=0))


def zoom(groups: Sequence[Group], target: float) -> dict[str, tuple[float, float]]:
    """Limits that show the curves that come to the target, from the first crossing to the last step."""
    found = [hit.step for group in groups for hit in group.crossings() if hit]
    last_step = max((group.last_step for group in groups), default=0)
    ends = [loss for group in groups for loss in group.losses(group.last_step) if loss < target]
    if not ends or not found:
        return {}
    depth = target - min(ends)
    return {"xlim": (min(found) - 0.1 * last_step, last_step), "ylim": (min(ends) - 0.1 * depth, target + depth)}


def draw_steps_to_target(axis, groups: Sequence[Group], styles: Sequence[tuple]) -> None:
    """A bar a group with its 95 % interval; an open one with an arrow where runs did not arrive, or nobody saw when."""
    hatches = ["", "//", "..", "xx", "\\\\", "++", "oo", "--"]
    found = [group.steps_to_target() for group in groups]
    heights = [reached.bracket[1] if reached.bracket else reached.restricted_mean for reached in found]
    longest = max(heights)
    for position, (group, reached, height, (color, _, marker)) in enumerate(
        zip(groups, found, heights, styles, strict=True)
    ):
        is_whole = reached.count == reached.runs and not reached.bracket
        hatch = hatches[position % len(hatches)]
        axis.barh(
            position, height, color=color if is_whole else "none", edgecolor=color if not is_whole else "white",
            alpha=0.7, hatch=hatch, height=0.6,
        )  # fmt: skip
        if is_whole and not math.isnan(reached.interval.low):
            low, high = reached.interval.low, reached.interval.high
            axis.errorbar(height, position, xerr=[[height - low], [high - height]], color="black", capsize=4, lw=1.5)
        axis.plot(height, position, marker=marker if is_whole else ">", color="black", markersize=5)
        for hit in group.crossings():
            if hit and not reached.bracket:
                axis.plot(hit.step, position + 0.38, marker="|", color="black", markersize=6)
        text = to_target(reached, 0).partition(" [")[0]
        if reached.count < reached.runs:
            text += f", {reached.count} of {reached.runs} arrived"
        axis.annotate(text, (0.02 * longest, position), va="center", color="black",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    axis.set_yticks(range(len(groups)), [printable(group.label) for group in groups])
    axis.invert_yaxis()
    axis.set_xlabel("steps to the target: mean, 95 % interval; ticks are seeds")
    axis.set_xlim(0, max(1, longest) * 1.08)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="?", choices=("loss", "neurons", "leverage"), default="loss", help="what to draw (loss)"
    )
    parser.add_argument("folder", type=Path, help="records of one task")
    parser.add_argument("--out", type=Path, help="PNG or SVG to write")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help="with neurons: print a table of these steps")
    args = parser.parse_args()
    if not (args.out or args.steps) or (args.steps and args.what != "neurons"):
        parser.error("name --out, or neurons and --steps")
    runs, errors = read_folder(args.folder, condensed=args.what == "loss")
    runs = [run for run in runs if run.validations]
    for error in errors:
        print(f"warning: {error}", file=sys.stderr)
    if not runs:
        print(f"error: no record in {args.folder}", file=sys.stderr)
        return 2
    tasks = by_task(runs)
    if len(tasks) != 1:
        print(f"error: {args.folder} must hold runs of one task, found {len(tasks)} tasks", file=sys.stderr)
        return 2
    (groups,) = group_runs(runs).values()
    if args.steps:
        from scripts.neurons import neurons_table

        try:
            print(neurons_table(groups, args.steps))
        except ValueError as error:
            print(f"error: {plain(error)}", file=sys.stderr)
            return 2
        if not args.out:
            return 0
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.what in ("neurons", "leverage"):
            from scripts.neurons import plot_leverage, plot_neurons

            (plot_neurons if args.what == "neurons" else plot_leverage)(groups, args.out)
        else:
            plot_loss_curves(runs, args.out)
    except ImportError as error:
        print(f"error: {error}; pip install -e '.[report]'", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture
        print(f"error: {args.out} cannot be written: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
