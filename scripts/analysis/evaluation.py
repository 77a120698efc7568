"""What evaluations say: figures with intervals, paired differences between runs, tables, JSON beside the record.

A document is what is drawn at random: its tokens hang together, so an interval over tokens would be too narrow. Nothing
here knows other seeds: the interval of one run is that of this run on other documents of the kind.
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from aurora.errors import Exit, HarnessError
from scripts.analysis.report import as_p
from scripts.analysis.statistics import CONFIDENCE, mean_interval, welch
from scripts.analysis.text import markdown_table, plain

SUFFIX = ".evaluation.json"


class Estimate(NamedTuple):
    """A figure with its 95 % interval; p of its being zero, of a difference. NaN where there is nothing to tell it."""

    value: float
    low: float
    high: float
    p: float = math.nan

    def text(self, digits: int) -> str:
        whole = f"{self.value:.{digits}f}"
        return whole if math.isnan(self.low) else f"{whole} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def as_json(self) -> list[float | None]:
        return [None if math.isnan(limit) else limit for limit in (self.low, self.high)]


def ratio(sums: np.ndarray, sizes: np.ndarray) -> Estimate:
    """sum(sums) / sum(sizes) of D documents, (D,) each, by the linearised variance of a ratio and Student's t.

    W. G. Cochran, Sampling Techniques (1977), section 6.3. With sizes of one it is the mean and its t-test.
    """
    value, count = float(sums.sum() / sizes.sum()), len(sums)
    if count < 2:
        return Estimate(value, math.nan, math.nan)
    error = float(math.sqrt(count / (count - 1) * np.square(sums - value * sizes).sum()) / sizes.sum())
    if error <= 1e-12 * abs(value) or error == 0:  # all alike, which tells nothing of others
        return Estimate(value, math.nan, math.nan)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error)
    return Estimate(value, value - half, value + half, float(2 * stats.t.sf(abs(value) / error, count - 1)))


class Evaluation(NamedTuple):
    """What one run makes of one text or task: of each document or item a sum (D,), and what it is divided by (D,).

    figure: what the ratio of the two is called. details: other figures, for the JSON.
    """

    kind: str  # text, hellaswag or tasks
    name: str  # of the file or task
    figure: str
    sums: np.ndarray
    sizes: np.ndarray
    details: dict[str, Any]

    def estimate(self) -> Estimate:
        return ratio(self.sums, self.sizes)

    def minus(self, other: "Evaluation") -> Estimate:
        """The difference of the figures of two runs on the same documents, paired by document."""
        return ratio(self.sums - other.sums, self.sizes)

    def as_json(self) -> dict[str, Any]:
        found = self.estimate()
        figures = {self.figure: found.value, f"{self.figure}_95": found.as_json(), "documents": len(self.sums)}
        return figures | {key: value for key, value in self.details.items() if key != "shown"}


def run_table(names: Sequence[str], evaluations: Sequence[Evaluation], escape: Callable[..., str] = plain) -> str:
    """One row a run, all on the same documents; each is compared with the first."""
    first, *_ = evaluations
    header = [
        "run",
        "documents",
        f"{first.figure} [95 %]",
        *first.details.get("shown", ()),
        "minus the first [95 %]",
        "p",
    ]
    rows = []
    for name, found in zip(names, evaluations, strict=True):
        difference = found.minus(first)
        shown = [f"{found.details[key]:.4f}" for key in first.details.get("shown", ())]
        cells = [escape(name), f"{len(found.sums):,}", found.estimate().text(4), *shown]
        rows.append([*cells, *(["-", "-"] if found is first else [difference.text(4), as_p(difference.p)])])
    return markdown_table(header, rows)


def group_table(groups: dict[str, list[Evaluation]], escape: Callable[..., str] = plain) -> str:
    """One row an optimizer and setting: mean over seeds, whose interval is that of other seeds on these documents."""
    figures = {label: [found.estimate().value for found in own] for label, own in groups.items()}
    first = next(iter(figures.values()))
    figure = next(iter(groups.values()))[0].figure
    rows = []
    for label, values in figures.items():
        interval = mean_interval(values)
        mean = Estimate(float(np.mean(values)), interval.low, interval.high)
        sd = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else "-"
        test = welch(values, first)
        difference = Estimate(test.difference, test.low, test.high).text(4), as_p(test.p)
        rows.append(
            [escape(label), str(len(values)), mean.text(4), sd, *(("-", "-") if values is first else difference)]
        )
    return markdown_table(["optimizer", "n", f"{figure} [95 %]", "sd", "minus the first [95 %]", "p (Welch)"], rows)


def evaluations_of(record: Path) -> Path:
    """Where the evaluations of the run with this record are."""
    return record.with_suffix(SUFFIX)


def save(record: Path, run_id: str, weights_sha256: str, evaluations: Sequence[Evaluation]) -> None:
    """Add to the JSON beside a record; what was there under a name is replaced.

    Raises:
        HarnessError: DISK, it cannot be written; CONFIG, what is there is something else.
    """
    path = evaluations_of(record)
    whole: dict[str, Any] = {"run_id": run_id, "weights_sha256": weights_sha256}
    try:
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            if there["weights_sha256"] == weights_sha256:  # else it is of other weights
                whole |= {key: dict(there[key]) for key in ("text", "hellaswag", "tasks") if key in there}
        for found in evaluations:
            whole.setdefault(found.kind, {})[found.name] = found.as_json()
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise HarnessError(Exit.DISK, f"{path} cannot be written: {error.strerror}; make room") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{path} is not what evaluate.py writes ({type(error).__name__}); move it away"
        raise HarnessError(Exit.CONFIG, message) from error
