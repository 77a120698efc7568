"""Evaluations of several runs: their tables, by run and by optimizer, and what a comparison shows of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aurora.errors import HarnessError
from aurora.trainer.record import Run
from scripts.analysis.evaluation import Evaluation, group_table, run_table, save
from scripts.analysis.text import plain
from scripts.analysis.verdict import group_runs
from scripts.models.load import Trained, load
from scripts.models.text import evaluate_text
from scripts.models.vocabulary import name_of


def evaluate_and_save(
    record: Path, evaluate: Callable[[Trained], list[Evaluation]], is_trusted: bool = False
) -> tuple[Run, list[Evaluation]]:
    """A run and what is found of it, which is written beside its record, too. Raises HarnessError."""
    trained = load(record, is_trusted)
    found = evaluate(trained)
    save(record, trained.name, str(trained.run.end_event["weights_sha256"]), found)
    return trained.run, found


def tables(runs: Sequence[Run], columns: Sequence[Sequence[Evaluation]]) -> str:
    """For each text and figure of a task a table of the runs, and where there are several seeds, of the optimizers."""
    names, parts = [plain(run.path.stem) for run in runs], []
    for column in columns:
        parts += [plain(column[0].name), run_table(names, column)]
        if len(groups := by_optimizer(runs, column)) < len(runs):
            parts.append(group_table(groups))
    return "\n\n".join(parts)


def by_optimizer(runs: Sequence[Run], column: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    """Evaluations of runs that differ in their seed alone, by what tells these groups apart."""
    found = {run.path: evaluation for run, evaluation in zip(runs, column, strict=True)}
    tasks = group_runs(runs)
    return {
        group.label if len(tasks) == 1 else f"{group.label}, task {task[:8]}": [found[run.path] for run in group.runs]
        for task, groups in tasks.items()
        for group in groups
    }


class Evaluated(NamedTuple):
    """One text's figures of several runs, and by run why others have none."""

    name: str
    runs: list[Run]
    column: list[Evaluation]
    reasons: dict[str, str]

    def text(self, escape: Callable[..., str]) -> str:
        parts = [f"On {escape(self.name)}:", group_table(by_optimizer(self.runs, self.column), escape)]
        reasons = [f"{escape(run)} is not evaluated: {escape(reason, 500)}" for run, reason in self.reasons.items()]
        return "\n\n".join([*(parts if self.runs else []), *reasons])

    def as_json(self) -> dict[str, Any]:
        figures = {run.path.stem: found.as_json() for run, found in zip(self.runs, self.column, strict=True)}
        return {"text": self.name, "runs": figures, "not_evaluated": self.reasons}


def evaluate_each(runs: Sequence[Run], text: Path) -> Evaluated:
    """Of each run that can be. Never raises HarnessError: a comparison has more to tell."""
    found = Evaluated(name_of(text), [], [], {})
    for run in runs:
        try:
            _, (evaluation,) = evaluate_and_save(run.path, lambda trained: [evaluate_text(trained, text)])
        except HarnessError as error:
            found.reasons[run.path.stem] = str(error)
            continue
        found.runs.append(run)
        found.column.append(evaluation)
    return found
