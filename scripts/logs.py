"""Read public training logs, and check whether a claim about them follows from them.

    python scripts/logs.py FOLDER...                                          what the logs hold
    python scripts/logs.py FOLDER --steps 3250 --mean 3.2787 --runs 10        does the claim follow?
    python scripts/logs.py --claims claims.json                               many: [{"row", "steps", "mean", "n"}, ...]
    python scripts/logs.py FOLDER_A --against FOLDER_B --steps 3250           whose loss is lower? (or who is earlier)
    python scripts/logs.py --export runs/quick/RUN.jsonl --out log.txt        a record of ours as such a log
    python scripts/logs.py --reference results/reference.toml --repo CLONE    are the checks of public results right?

The logs of a row of claims.json are in the folder rowNN beside it. scripts/analysis/foreign.py describes the formats.
Exit codes: 0 done, 1 a claim does not follow, 2 there is nothing to read. With
--reference, 1 means that the file does not state what the logs give.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aurora.console import run_script
from scripts.analysis.text import plain

TARGET_METRIC, TARGET = "val_loss", 3.28  # of the public benchmark


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", type=Path, metavar="FOLDER", help="folders of logs")
    parser.add_argument("--target", type=float, help="loss to reach (3.28 of val_loss; of another --metric name it)")
    parser.add_argument("--metric", help="name of the loss (val_loss)")
    parser.add_argument("--steps", type=int, help="step of the claimed loss")
    parser.add_argument("--mean", help="claimed mean loss at that step, with all its digits")
    parser.add_argument("--runs", type=int, help="claimed number of runs")
    parser.add_argument("--claims", type=Path, metavar="FILE", help="check every claim of this file")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="compare with the logs of this folder")
    parser.add_argument("--export", type=Path, metavar="RECORD", help="write this record as a log to --out")
    parser.add_argument("--out", type=Path, help="with --export: the log to write")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="check the public results of this file")
    parser.add_argument("--repo", type=Path, metavar="CLONE", help="with --reference: a clone of their repository")
    parser.add_argument("--write", action="store_true", help="with --reference: write what the logs give into the file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if not (args.logs or args.claims or args.export or args.reference):
        parser.error("name logs, --claims, --export or --reference")
    if bool(args.reference) != bool(args.repo) or (args.write and not args.reference):
        parser.error("--reference and --repo need each other, and --write needs them")
    if args.export and not args.out:
        parser.error("--export needs --out")
    if args.target is None:
        if args.metric not in (None, TARGET_METRIC):
            parser.error(f"--metric {plain(args.metric)} needs --target: {TARGET} is a {TARGET_METRIC}")
        args.target = TARGET
    if args.claims and not args.claims.is_file():
        parser.error(f"--claims: no such file: {plain(args.claims)}")
    try:
        if args.export:
            from scripts.verification.export import export_record

            export_record(args.export, args.out)
            print(args.out)
            return 0
        from scripts.analysis import board, claims, log_comparison

        if args.reference:
            table, stale = board.check_reference(args.reference, args.repo, args.write)
            print(table)
            for line in stale:
                print(f"error: {args.reference}, {plain(line, 500)}; write it with --write", file=sys.stderr)
            return 1 if stale else 0
        if args.claims:
            findings = claims.check_file(args.claims, args.target, args.metric)
        elif args.against:
            metric = args.metric or "val_loss"
            findings = [log_comparison.compare(args.logs, [args.against], args.steps, metric, args.target)]
        else:
            claim = claims.Claim(", ".join(map(str, args.logs)), args.steps, args.mean, args.runs)
            findings = [claims.check(args.logs, claim, args.target, args.metric)]
    except ImportError as error:
        print(f"error: {error}; pip install -e '.[report]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {plain(error, 500)}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(findings, indent=1, default=str))
    else:
        as_text = log_comparison.as_text if args.against and not args.claims else claims.as_text
        print("\n\n".join(map(as_text, findings)))
    return 0 if all(finding.get("follows", True) for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
