"""Verify records. Are they consistent with themselves? With --replay: does their code give their losses again?

    python scripts/verify.py RECORD_OR_FOLDER... [--json]
    python scripts/verify.py RECORD --replay [--validations 2]  RUNS THE CODE IN THE RECORD: only if you would run it
    python scripts/verify.py FOLDER --against FOLDER        runs of your own, of the same setting with other seeds

Verdicts on a record:

    consistent          its own numbers fit together
    gaps                they do, but seeds are missing beside it
    incomplete          they do, but the record does not tell how the run ended: it goes on, or was killed; or how it
                        began: the record was emptied, and the run resumed
    refuted             they do not; the reasons follow
    replayed            its code and seed gave its losses again: all, or "to step N of M"; "within T on another stack"
                        if they differ by up to T nats

Verdicts of --against, by Welch's test of the losses at the end:

    reproduced          with 95 % confidence the claim exaggerates by less than 0.005 nats
    contradicted        your losses are higher, p < 0.01
    not contradicted    too few runs to tell
    not comparable      there is no test: another task or setting, shared seeds, or too few finished runs

scripts/verification/checks.py says what each check can and cannot catch.
Exit codes: 0 nothing refuted, 1 something refuted, or not replayed or reproduced as asked, 2 usage.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.console import run_script
from aurora.trainer.record import Run, distinct, read_folder, read_record, record_paths
from scripts.analysis.text import plain
from scripts.verification.checks import is_folder, verify_folder, verify_run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RECORD_OR_FOLDER")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--replay", action="store_true", help="run the code embedded in each record")
    parser.add_argument(
        "--validations",
        type=int,
        default=2,
        metavar="N",
        help="number of validations to replay, the one at step 0 included (2)",
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="runs of your own with other seeds")
    args = parser.parse_args(argv)
    if args.validations < 1:
        parser.error(f"--validations must be at least 1, got {args.validations}")
    if args.against and not args.against.is_dir():
        parser.error(f"--against: no such folder: {plain(args.against)}")
    for path in args.paths:
        if not path.exists():
            parser.error(f"no such file: {plain(path)}")
        if path.is_file() and path.suffix != ".jsonl":
            parser.error(f"{plain(path)} is not a record, which is a .jsonl file")
        if is_folder(path) and not record_paths(path):
            parser.error(f"{plain(path)} holds no records")
    verdicts = verify_folder(*args.paths)
    if args.replay:
        from scripts.verification.replay import replay

        verdicts = [verdict if verdict.reasons else replay(verdict, args.validations) for verdict in verdicts]
    outcome = against(args.paths, args.against) if args.against else None
    if args.json:
        rows = [dataclasses.asdict(v) | {"path": str(v.path), "word": v.word} for v in verdicts]
        print(json.dumps({"records": rows, "against": outcome}, indent=1))
    else:
        for verdict in verdicts:
            print(f"{verdict.word:11} {plain(verdict.path)}")
            for label, texts in (("because", verdict.reasons), ("note", verdict.notes)):
                for text in texts:
                    print(f"            {label}: {plain(text)}")
        counts = {word: sum(v.word == word for v in verdicts) for word in sorted({v.word for v in verdicts})}
        print(", ".join(f"{count} {word}" for word, count in counts.items()))
        if outcome:
            print(": ".join(outcome))
    if outcome and outcome[0] != "reproduced":
        return 1
    words = {verdict.word for verdict in verdicts}
    return int("refuted" in words or (args.replay and not all(word.startswith("replayed") for word in words)))


def against(claimed: list[Path], own: Path) -> tuple[str, str]:
    """What one's own records say of the claimed ones."""
    from scripts.verification.reproduction import reproduce

    sides = [distinct(run for path in paths for run in runs_at(path))[0] for paths in (claimed, [own])]
    return reproduce(*sides) if all(sides) else ("not comparable", "a side holds no record")


def runs_at(path: Path) -> list[Run]:
    """The readable runs of a folder, or of one file; what cannot be read is refuted anyway."""
    return read_folder(path)[0] if path.is_dir() else [read_record(path)] if not verify_run(path).reasons else []


if __name__ == "__main__":
    sys.exit(run_script(main))
