"""The records that the page of claims rests on, as results/findings.toml names them."""

import json
from pathlib import Path
from typing import Any

from aurora.trainer.record import read_folder
from scripts.analysis.trial import Trial
from scripts.analysis.verdict import Group, group_runs

# Groups by expansion factor and optimizer.
Widths = dict[int, dict[str, Group]]


class Evidence:
    """The records that findings.toml names."""

    def __init__(self, results: Path, names: dict[str, Any]):
        self.trial = Trial(results, names["trial"])
        self.tracks = {folder: only_groups(results / folder) for folder in names["tracks"]}
        self.older = {
            entry["folder"]: (only_groups(results / entry["folder"]), entry["but"]) for entry in names["older"]
        }
        self.widths = widths_of(groups_in(results / names["expansion"]))
        self.long = only_groups(results / names["long"])
        self.costs = {name: json.loads((results / name).read_text(encoding="utf-8")) for name in names["costs"]}
        self.expansion_folder, self.long_folder = names["expansion"], names["long"]


def groups_in(folder: Path) -> dict[str, list[Group]]:
    """Groups by task of the records of a folder.

    Raises:
        ValueError: a file is not a record.
    """
    runs, errors = read_folder(folder) if folder.is_dir() else ([], [])
    if errors:
        raise ValueError(str(errors[0]))
    return group_runs(runs)


def only_groups(folder: Path) -> dict[str, Group]:
    """The group of each optimizer, of a folder that holds one task and one setting of each.

    Raises:
        ValueError: it holds more.
    """
    tasks = groups_in(folder)
    groups = [group for of_task in tasks.values() for group in of_task]
    found = {group.optimizer: group for group in groups}
    if len(tasks) > 1 or len(found) < len(groups):
        raise ValueError(f"{folder} holds {len(tasks)} tasks and {len(groups)} settings of {len(found)} optimizers")
    return found


def widths_of(tasks: dict[str, list[Group]]) -> Widths:
    """Runs by the expansion factor of their model, in its order."""
    found: Widths = {}
    for groups in tasks.values():
        expansion = groups[0].runs[0].start["config"]["model"]["mlp_expansion"]
        found.setdefault(expansion, {}).update({group.optimizer: group for group in groups})
    return dict(sorted(found.items()))


def gains(widths: Widths, base: str, other: str) -> dict[int, dict[int, float]]:
    """base's final loss minus other's, by expansion factor and seed, where both have runs that finished."""
    found = {}
    for expansion, groups in widths.items():
        losses = {
            name: {run.start["seed"]: run.end_event["val_loss"] for run in group.runs if run.is_done}
            for name, group in groups.items()
        }
        shared = sorted(losses.get(base, {}).keys() & losses.get(other, {}).keys())
        if shared:
            found[expansion] = {seed: losses[base][seed] - losses[other][seed] for seed in shared}
    return found
