"""Evaluate what finished runs have learnt: on text, on HellaSwag, on the tasks of lm-evaluation-harness.

    python scripts/evaluate.py runs/quick                                        the tokens they were validated with
    python scripts/evaluate.py runs/quick --text README.md --text book.txt       bits per byte of your own text
    python scripts/evaluate.py RUN RUN --hellaswag hellaswag_val.jsonl
    python scripts/evaluate.py RUN --tasks lambada_openai,piqa                   pip install -e '.[evaluation]'

RUN is a record, a run id in runs/, or a folder of runs, of which those without weights are left out. All figures have
95 % intervals over documents or items. Each run is compared with the first, document by document; with several seeds,
optimizers are compared over those. The figures are added to <run_id>.evaluation.json beside each record. Text is .txt
(documents end with <|endoftext|>), .jsonl, .jsonl.gz, .parquet, a shard, or any other file as one document.

Exit codes: 0 done, 2 usage, 3 text, 4 weights or code that cannot be used, 7 disk.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.console import run_script
from aurora.errors import Exit, HarnessError
from aurora.trainer.record import Run, record_paths
from aurora.trainer.weights import weights_of
from scripts.analysis.text import plain

if TYPE_CHECKING:
    from scripts.analysis.evaluation import Evaluation
    from scripts.models.load import Trained


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a record, a run id in runs/, or a folder of runs")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE", help="text, or a shard")
    parser.add_argument("--tokens", type=int, metavar="N", help="of a shard, the first N tokens (all)")
    parser.add_argument("--hellaswag", metavar="FILE", help="its items, a .jsonl file; hub: download them")
    parser.add_argument("--tasks", metavar="A,B", help="tasks of lm-evaluation-harness, by name")
    parser.add_argument("--include-path", metavar="FOLDER", help="a folder with tasks of your own for the harness")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each item of a task")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of HellaSwag and of each task (all)")
    parser.add_argument("--trust", action="store_true", help="run a model's code that is not this checkout's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    for name in ("tokens", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    for path in args.text:
        if not path.is_file():
            parser.error(f"--text: no such file: {plain(path)}")
    if args.tokens and not args.text:
        parser.error("--tokens is for a shard that --text names")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        import scripts.analysis.evaluation  # noqa: F401  before models are loaded

        if args.tasks:
            import scripts.models.harness  # noqa: F401
    except ImportError as error:
        print(f"error: {error}; pip install -e '.[train,report,evaluation]'", file=sys.stderr)
        return int(Exit.CONFIG)
    try:
        evaluate(args)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.reason)
    return 0


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate all runs, one after the other, and print what they give. Raises HarnessError."""
    from scripts.models.several import evaluate_and_save, tables

    runs: list[Run] = []
    found: list[list[Evaluation]] = []
    for path in records_of(args.runs):
        print(f"evaluating {plain(path.stem)}", file=sys.stderr, flush=True)
        run, own = evaluate_and_save(path, lambda trained: evaluations(trained, args), args.trust)
        runs.append(run)
        found.append(own)
    columns = list(zip(*found, strict=True))  # of each text or task the evaluations of all runs
    print(as_json(runs, columns) if args.json else tables(runs, columns))


def records_of(names: Sequence[str]) -> list[Path]:
    """The records that are meant, each once."""
    from scripts.models.load import find_record

    found: dict[Path, None] = {}
    for name in names:
        folder = record_paths(Path(name)) if Path(name).is_dir() else []
        own = [path for path in folder if weights_of(path).exists()]
        found |= dict.fromkeys(own if len(folder) > 1 and own else [find_record(name)])
    return list({path.resolve(): path for path in found}.values())


def evaluations(trained: "Trained", args: argparse.Namespace) -> list["Evaluation"]:
    """All that is asked for, of one run."""
    from scripts.models.hellaswag import evaluate_hellaswag
    from scripts.models.text import evaluate_text, evaluate_validation

    found = [evaluate_text(trained, path, args.tokens) for path in args.text]
    if args.hellaswag:
        found += evaluate_hellaswag(trained, args.hellaswag, args.limit)
    if args.tasks:
        from scripts.models.harness import evaluate_tasks

        found += evaluate_tasks(trained, args.tasks.split(","), args.include_path, args.num_fewshot, args.limit)
    return found or [evaluate_validation(trained)]


def as_json(runs: Sequence[Run], columns: Sequence[Sequence["Evaluation"]]) -> str:
    rows = []
    for column in columns:
        for run, found in zip(runs, column, strict=True):
            difference = found.minus(column[0])
            row = {"run": run.path.stem, "kind": found.kind, "name": found.name} | found.as_json()
            row |= {"minus_first": difference.value, "minus_first_95": difference.as_json()}
            rows.append(row)
    return json.dumps(rows, indent=1)


if __name__ == "__main__":
    sys.exit(run_script(main))
