"""All that the page of scripts/report.py shows, as JSON. Statistics are those of scripts/analysis/report.py."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from aurora.errors import HarnessError
from aurora.trainer.record import Run
from scripts import neurons
from scripts.analysis.headline import headline
from scripts.analysis.page import config_name, hardware
from scripts.analysis.provenance import provenance
from scripts.analysis.report import HEADER, LONG, PAIR_HEADER, as_json, group_cells, pair_cells, remarks
from scripts.analysis.text import plain
from scripts.analysis.tuning import best_of
from scripts.analysis.verdict import MOST_GROUPS, Group, compare_pairs, group_runs, mean_curve, status_of
from scripts.plot import MOST_CURVES, SHOWN_FROM_FRAC, Style, styles_by_name, styles_of, zoom
from scripts.tune import LEDGER, Ledger
from scripts.verification.checks import Verification

# What matplotlib calls a line by, as lengths of dashes and gaps.
DASHES = {"-": (), "--": (6, 3), "-.": (7, 3, 1.5, 3), ":": (1.5, 2.5)}


PERSISTENT_LOOKS = 4


class Measure(NamedTuple):
    """What telemetry tells of a layer at a step."""

    title: str
    meaning: str
    scale: float  # 100 for shares, shown in percent
    value: Callable[[dict[str, Any], int], float]


def of_up(key: str) -> Callable[[dict[str, Any], int], float]:
    return lambda event, layer: event["matrices"][f"blocks.{layer}.mlp.up"][key]


def low_leverage(event: dict[str, Any], layer: int) -> float:
    """Older records know it of the momentum alone."""
    return of_up("low_leverage" if "low_leverage" in event else "starved_momentum")(event, layer)


def persistent(event: dict[str, Any], layer: int) -> float:
    streaks = event["matrices"][f"blocks.{layer}.mlp.up"]["low_streaks"]
    return streaks[PERSISTENT_LOOKS - 1] if len(streaks) >= PERSISTENT_LOOKS else 0


def share_of(value: Callable[[dict[str, Any], int], float]) -> Callable[[dict[str, Any], int], float]:
    return lambda event, layer: value(event, layer) / event["width"]


MEASURES = {
    "starved": Measure(
        "starved rows (%)",
        "Rows of the MLP's up-projection that got under a tenth of an even share of the update's energy.",
        *(100, neurons.starved_share),
    ),
    "dead": Measure(
        "dead neurons (%)",
        "Neurons whose part in their layer's output is under 1 % of the mean one's.",
        *(100, neurons.dead_share),
    ),
    "silent": Measure(
        "silent neurons (%)",
        "Neurons that are active on almost no token.",
        *(100, share_of(lambda event, layer: event["layers"][layer]["silent"])),
    ),
    "leverage": Measure(
        "rows of low leverage (%)",
        "Rows of the up-projection whose leverage in the momentum that the rule saw is under a tenth of an even one.",
        *(100, share_of(low_leverage)),
    ),
    "persistent": Measure(
        f"rows of low leverage for {PERSISTENT_LOOKS} looks (%)",
        f"The same, if it was so at this look and at the {PERSISTENT_LOOKS - 1} before.",
        *(100, share_of(persistent)),
    ),
    "uneven": Measure(
        "unevenness of the update",
        "Standard deviation of the row norms of the up-projection's update over their mean.",
        *(1, neurons.update_cv),
    ),
    "rank": Measure("effective rank", "Effective rank of the up-projection's weights.", 1, of_up("effective_rank")),
}


def page_data(
    runs: Sequence[Run],
    out: Path,
    folders: Sequence[Path] = (),
    verdicts: Mapping[Path, Verification] | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Args:
    runs: with all of their events, at least one.
    out: the page, from which links lead to records.
    folders: in which ledgers of tuning are looked for.
    verdicts: of the records by path; None where they were not verified.
    """
    # First what can be tested, then the trials of tuning, which are many, but one of each setting.
    tasks = sorted(group_runs(runs).items(), key=lambda task: -max(len(group.runs) for group in task[1]))
    data = {
        "tasks": [task_data(task, groups, out, verdicts) for task, groups in tasks],
        "tuning": [found for folder in folders for found in tunings(folder)],
        "warnings": [without_folders(text, runs, folders) for text in warnings],
    }
    return clean(data)


def without_folders(text: str, runs: Sequence[Run], folders: Sequence[Path] = ()) -> str:
    """Names of records as they are below their folder: where that is on a machine is nobody's concern."""
    places = {*folders, *(run.path.parent for run in runs)}
    for place in sorted({f"{name}/" for path in places for name in (path, path.absolute())}, key=len, reverse=True):
        text = text.replace(place, "") if len(place) > 2 else text  # "./" may be anything
    return text


def clean(value: Any) -> Any:
    """Strings on one line, without what hides or turns text; infinite and undefined numbers as None."""
    if isinstance(value, str):
        return plain(value, LONG)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {plain(key, LONG): clean(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [clean(entry) for entry in value]
    return value


def task_data(
    task: str, groups: Sequence[Group], out: Path, verdicts: Mapping[Path, Verification] | None
) -> dict[str, Any]:
    pairs, first = compare_pairs(groups), groups[0].runs[0]
    numbers = as_json(groups)
    for row in numbers["groups"]:
        del row["records"]  # folders of this machine; each run below has a link
    runs = [(index, run) for index, group in enumerate(groups) for run in group.runs]
    shown = groups[:MOST_CURVES]
    near = zoom(shown, first.target)
    title, lines = headline(groups, pairs)
    grids: list[list[int]] = []  # the steps of validations, which most runs have alike
    return {
        "task": task,
        "name": config_name(first),
        "title": title,
        "lines": lines,
        "hardware": sorted({hardware(run) for _, run in runs}),
        "batch_tokens": first.start["config"]["train"]["batch_tokens"],
        "numbers": numbers,
        "table": {"header": HEADER, "rows": [group_cells(group) for group in groups]},
        "pairs": {"header": PAIR_HEADER, "rows": [pair_cells(pair) for pair in pairs]},
        "remarks": remarks(groups, pairs),
        "styles": list(map(style_data, styles_of(shown))),
        "near_target": {"x": near["xlim"], "y": near["ylim"]} if near else None,
        "shown_from": SHOWN_FROM_FRAC,
        "means": [mean_data(group, grids) for group in groups],
        "runs": [run_data(index, run, out, grids, verdicts) for index, run in runs],
        "grids": grids,
        "neurons": neuron_data(groups[:MOST_GROUPS]),
        "provenance": provenance([run for _, run in runs]),
    }


def style_data(style: Style) -> dict[str, Any]:
    color, line, marker = style
    return {"color": color, "dash": DASHES[line] if isinstance(line, str) else line[1], "marker": marker}


def place_in(grids: list[list[int]], steps: list[int]) -> int:
    if steps not in grids:
        grids.append(steps)
    return grids.index(steps)


def mean_data(group: Group, grids: list[list[int]]) -> dict[str, Any]:
    points = mean_curve(group)
    return {
        "grid": place_in(grids, [point.step for point in points]),
        "seconds": [round(point.seconds, 3) for point in points],
        **{key: [round(getattr(point, key), 6) for point in points] for key in ("low", "mean", "high")},
    }


def run_data(
    group: int, run: Run, out: Path, grids: list[list[int]], verdicts: Mapping[Path, Verification] | None
) -> dict[str, Any]:
    found = None if verdicts is None else verdicts.get(run.path)
    return {
        "group": group,
        "seed": run.start["seed"],
        "status": status_of(run),
        "name": run.path.name,
        "link": link(run.path, out),
        "code": run.start.get("code_hash", "")[:12],
        "verdict": found.word if found else None,
        "reasons": [without_folders(text, [run]) for text in (*found.reasons, *found.notes)] if found else [],
        "grid": place_in(grids, [validation.step for validation in run.validations]),
        "losses": [round(validation.val_loss, 6) for validation in run.validations],
        "seconds": [round(validation.train_time_s, 3) for validation in run.validations],
    }


def link(path: Path, out: Path) -> str:
    """Relative, beginning with a dot, so that no name of a file can make it an address of another kind."""
    found = quote(Path(os.path.relpath(path.absolute(), out.absolute().parent)).as_posix())
    return found if found.startswith("../") else f"./{found}"


def neuron_data(groups: Sequence[Group]) -> dict[str, Any]:
    """Means over seeds, by measure, group, layer and step, of the finished runs, or of all where none has finished."""
    found: dict[str, list[dict[str, Any]]] = {}
    for index, group in enumerate(groups):
        seen = [run for run in group.runs if run.neuron_events]
        seen = [run for run in seen if run.is_done] or seen
        for key, measure in MEASURES.items() if seen else ():
            if key in ("dead", "silent") and key not in seen[0].neuron_events[0]:  # of gated MLPs
                continue
            try:
                steps, values = neurons.over_training(Group(group.label, seen), measure.value)
            except ValueError:  # older records lack some, edited models have other layers
                continue
            means = measure.scale * values.mean(axis=0)
            rows = [[float(f"{value:.4g}") for value in row] for row in means]
            found.setdefault(key, []).append({"group": index, "runs": len(seen), "steps": steps, "values": rows})
    return {
        key: {"title": MEASURES[key].title, "meaning": MEASURES[key].meaning, "groups": found[key]}
        for key in MEASURES
        if key in found
    }


def tunings(folder: Path) -> list[dict[str, Any]]:
    """The trials of each ledger in a folder or below it; one that is none is left out with a word."""
    found = []
    for path in sorted(folder.rglob(LEDGER)):
        try:
            ledger = Ledger(path, [])
            names = list(dict.fromkeys(entry["optimizer"] for entry in ledger.entries))
            optimizers = [tuning_of(*pair, ledger) for pair in zip(names, styles_by_name(names), strict=True)]
            found.append({"name": path.parent.name, "optimizers": optimizers, "error": ""})
        except (HarnessError, OSError, TypeError, AttributeError, ValueError) as error:
            found.append({"name": path.parent.name, "optimizers": [], "error": f"{LEDGER} cannot be read: {error}"})
    return found


def tuning_of(optimizer: str, style: Style, ledger: Ledger) -> dict[str, Any]:
    trials = ledger.trials(optimizer)
    best = best_of(trials)
    return {
        "optimizer": optimizer,
        "style": style_data(style),
        "trials": [
            {
                "trial": trial.number, "knob": trial.knob, "setting": dict(trial.setting), "why": trial.why,
                "loss": trial.val_loss, "chosen": trial is best,
            }
            for trial in trials
        ],
    }  # fmt: skip
