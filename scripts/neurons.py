"""Plots and table of `scripts/plot.py neurons` and `leverage`: neurons over training, by layer and optimizer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aurora.optim.diagnostics import LEVERAGE_EDGES, STARVED_FRAC
from scripts.analysis.text import cell, markdown_table
from scripts.analysis.verdict import Group
from scripts.plot import printable, save_figure, styles_of

# What is drawn, see aurora/trainer/neurons.py for the events.
STARVED = "starved rows of up (%)"
DEAD = "dead neurons (%)"
UNEVEN = "row norms of up's update, sd / mean"


def starved_share(event: dict[str, Any], layer: int) -> float:
    return event["matrices"][f"blocks.{layer}.mlp.up"]["starved"] / event["width"]


def dead_share(event: dict[str, Any], layer: int) -> float:
    return event["layers"][layer]["dead"] / event["width"]


def update_cv(event: dict[str, Any], layer: int) -> float:
    return event["matrices"][f"blocks.{layer}.mlp.up"]["update_cv"]


def over_training(
    group: Group, value: Callable[[dict[str, Any], int], float | list[int]]
) -> tuple[list[int], np.ndarray]:
    """Steps that all runs have measured, and values (runs, layers, steps), or lists of values (..., values).

    Raises:
        ValueError: a run has no telemetry, or runs of unlike models.
    """
    by_step = [{event["step"]: event for event in run.neuron_events} for run in group.runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    depths = {len(event["layers"]) for events in by_step for event in events.values()}
    if not steps or len(depths) != 1:
        raise ValueError(f"runs of {group.label} have no telemetry of neurons in common (eval.telemetry)")
    layers = range(depths.pop())
    try:
        values = [[[np.array(value(events[s], i), float) for s in steps] for i in layers] for events in by_step]
    except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"runs of {group.label}: telemetry is not whole ({error!r})") from error
    return steps, np.array(values)


TABLE_HEADER = (
    *("optimizer", "runs", "step", "starved rows (%)", "rows of low leverage (%)", "dead neurons (%)"),
    "sd / mean of row norms",
)


def neurons_table(groups: Sequence[Group], steps: Sequence[int]) -> str:
    """How neurons fare at these steps: means over seeds, with their range in brackets, all layers together.

    Starved: rows of up, and of the gate, with under 10 % of an even row's share of the update's energy. Of low
    leverage: with under 10 % of an even row's leverage in what the rule saw. Runs that did not reach their end are
    left out.

    Raises:
        ValueError: a run has no telemetry of one of the steps.
    """
    rows = []
    for group in groups:
        done = [run for run in group.runs if run.is_done]
        for step in steps if done else ():
            events = [next((e for e in run.neuron_events if e["step"] == step), None) for run in done]
            if None in events:
                raise ValueError(f"a run of {group.label} has no telemetry at step {step}; see eval.every")
            found = [event for event in events if event is not None]
            norms = [[m["update_cv"] for name, m in e["matrices"].items() if not name.endswith("down")] for e in found]
            shares = [[event.get(key) for event in found] for key in ("starved", "dead")]
            shares.insert(
                1, [event.get("low_leverage", event.get("starved_momentum")) for event in found]
            )  # of older ones
            cells = list(map(in_percent, shares))
            cells.append(with_range([float(np.mean(of_run)) for of_run in norms], 3))
            rows.append((cell(group.label), str(len(found)), str(step), *cells))
    return markdown_table(TABLE_HEADER, rows)


def in_percent(shares: Sequence[float | None]) -> str:
    known = [100 * share for share in shares if share is not None]
    return with_range(known, 1) if len(known) == len(shares) else "-"


def with_range(values: Sequence[float], digits: int) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in (float(np.mean(values)), min(values), max(values)))
    return f"{mean} [{low}, {high}]"


def plot_neurons(groups: Sequence[Group], path: Path, description: str = "") -> None:
    """Heat maps of layer against step for each group, starved rows above dead neurons, on one scale; below, curves.

    Starved: under 10 % of an even row's share of the update's energy. Dead: under 1 % of the mean neuron's part in its
    layer's output; left out where the events do not tell their share. Maps show means over seeds; curves means over
    layers, with the range of seeds as a band.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {"text.parse_math": False, "svg.hashsalt": "", "font.size": 9}
    mapped = [(STARVED, starved_share)]
    if all("dead" in event for group in groups for run in group.runs for event in run.neuron_events):
        mapped.append((DEAD, dead_share))
    with matplotlib.rc_context(settings):
        figure = plt.figure(figsize=(max(9.0, 2.6 * len(groups) + 1), 8.5), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
        maps = top.subplots(len(mapped), len(groups), squeeze=False, sharey=True)
        for index, (title, value) in enumerate(mapped):
            found = [over_training(group, value) for group in groups]
            means = [100 * values.mean(axis=0) for _, values in found]
            highest = max(1.0, *(mean.max() for mean in means))
            for axis, group, (steps, _), mean in zip(maps[index], groups, found, means, strict=True):
                # Cividis validations alike to readers of any colour vision, and darkens evenly in grey print.
                image = axis.pcolormesh(mean, cmap="cividis", vmin=0, vmax=highest)
                shown = range(0, len(steps), max(1, len(steps) // 4))
                axis.set_xticks([i + 0.5 for i in shown], [str(steps[i]) for i in shown])
                axis.set_yticks([i + 0.5 for i in range(len(mean))], [str(i) for i in range(len(mean))])
                if index == 0:
                    axis.set_title(f"{printable(group.label)} (n = {len(group.runs)})")
                if index == len(mapped) - 1:
                    axis.set_xlabel("step")
            maps[index][0].set_ylabel("layer")
            top.colorbar(image, ax=list(maps[index]), label=title)
        drawn = [*((title, value, 100) for title, value in mapped), (UNEVEN, update_cv, 1)]
        curves = bottom.subplots(1, len(drawn))
        for axis, (title, value, scale) in zip(curves, drawn, strict=True):
            for group, (color, line, marker) in zip(groups, styles_of(groups), strict=True):
                steps, values = over_training(group, value)
                by_seed = scale * values.mean(axis=1)
                axis.fill_between(steps, by_seed.min(axis=0), by_seed.max(axis=0), color=color, alpha=0.15, lw=0)
                axis.plot(
                    *(steps, by_seed.mean(axis=0)),
                    color=color, linestyle=line, marker=marker, markersize=4.5, label=printable(group.label),
                )  # fmt: skip
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        curves[0].legend()
        save_figure(figure, path, description)
        plt.close(figure)


def plot_leverage(groups: Sequence[Group], path: Path, description: str = "") -> None:
    """Histograms of the rows' leverage over training: layers below each other, a column for each group.

    Of up and of the gate, in what the rule saw, in units of an even row's. Shares of rows are means over seeds, on a
    scale of logarithms, since a few rows matter. Below the dashed line leverage is called low.

    Raises:
        ValueError: a run has no such telemetry.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    found = [over_training(group, histogram_of_tall) for group in groups]
    depth = len(found[0][1][0])
    size = max(6.0, 2.4 * len(groups) + 1.2), 1.7 * depth + 0.8
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "", "font.size": 9}):
        figure, axes = plt.subplots(
            depth, len(groups), figsize=size, squeeze=False, sharex="col", sharey=True, layout="constrained"
        )
        decades = (-3, -2, -1, 0, 1)
        for column, (group, (steps, counts)) in enumerate(zip(groups, found, strict=True)):
            shares = counts.mean(axis=0) / counts.mean(axis=0).sum(axis=-1, keepdims=True)
            for layer, (axis, of_layer) in enumerate(zip(axes[:, column], shares, strict=True)):
                norm = LogNorm(1e-3, 1)
                image = axis.pcolormesh(np.where(of_layer.T > 0, of_layer.T, np.nan), cmap="cividis", norm=norm)
                axis.set_facecolor("white")
                axis.axhline(1 + LEVERAGE_EDGES.index(STARVED_FRAC), color="black", lw=0.8, linestyle="--")
                shown = range(0, len(steps), max(1, len(steps) // 4))
                axis.set_xticks([i + 0.5 for i in shown], [str(steps[i]) for i in shown])
                axis.set_yticks([1 + 4 * (k + 3) for k in decades], [f"{10.0**k:g}" for k in decades])
                if column == 0:
                    axis.set_ylabel(f"layer {layer}")
            axes[0][column].set_title(f"{printable(group.label)}\n(n = {len(group.runs)})", fontsize=9)
            axes[-1][column].set_xlabel("step")
        figure.supylabel("leverage of rows, in units of an even one", fontsize=10)
        bar = figure.colorbar(image, ax=list(axes.flat), label="share of rows (%)", aspect=40)
        bar.set_ticks([1e-3, 1e-2, 1e-1, 1], labels=["0.1", "1", "10", "100"])
        save_figure(figure, path, description)
        plt.close(figure)


def histogram_of_tall(event: dict[str, Any], layer: int) -> list[int]:
    matrices = [event["matrices"].get(f"blocks.{layer}.mlp.{kind}") for kind in ("gate", "up")]
    return np.sum([matrix["leverage_histogram"] for matrix in matrices if matrix], axis=0).tolist()
