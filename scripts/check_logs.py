"""Public text logs: what they hold, whether a claim follows from them, and how two folders of them compare.

python scripts/check_logs.py LOG... --steps 3250 --mean 3.2787 --runs 10 [--target 3.28] [--metric val_loss]
python scripts/check_logs.py --claims claims.json     # [{row, steps, mean, n}, ...] with logs in rowNN beside it
python scripts/check_logs.py LOG... --against LOG...

Exit codes: 0 all claims follow, 1 some do not or a log cannot be read, 2 usage.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from results.claims import Claim, Finding, check_claim, compare_logs
from results.foreign import MAX_LINE_BYTES, Trial, read_logs
from results.text import plain


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", type=Path)
    parser.add_argument("--claims", type=Path)
    parser.add_argument("--against", nargs="+", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--mean", help="as stated, its digits count")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--target", type=float, default=3.28)
    parser.add_argument("--metric", default="val_loss")
    args = parser.parse_args(argv)
    if bool(args.logs) == bool(args.claims):
        parser.error("name logs, or --claims")
    missing = [str(path) for path in args.logs + (args.against or []) if not path.exists()]
    if missing:
        parser.error(f"no such file: {plain(', '.join(missing))}")
    stated = [args.steps, args.mean, args.runs]
    try:
        if args.claims:
            claims = read_claims(args.claims)
        elif None not in stated:
            claims = [("claim", Claim(args.steps, checked_mean(args.mean), args.runs), args.logs)]
        elif args.against or stated[1:] == [None, None]:
            claims = []
        else:
            raise ValueError("a claim needs --steps, --mean and --runs")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        parser.error(f"no claims: {plain(error)}")
    is_good = True
    for name, claim, paths in claims:
        trials, errors = read_logs(paths)
        finding = check_claim(trials, claim, args.target, args.metric)
        finding.reasons += map(str, errors)
        print(report(name, claim, finding))
        is_good &= not finding.reasons
    if args.logs and not claims:
        trials, errors = read_logs(args.logs)
        if args.against:
            others, more = read_logs(args.against)
            errors += more
            if trials and others:
                print(plain(compare_logs(trials, others, args.steps, args.metric)))
        else:
            for trial in trials:
                print(describe(trial, args.metric))
        for error in errors:
            print(f"not read: {plain(error)}", file=sys.stderr)
        is_good = not errors
    return 0 if is_good else 1


def checked_mean(text: str) -> str:
    if not 0 < float(text) < 100 or "e" in text.lower() or len(text) > 20:
        raise ValueError(f"a mean loss like 3.2787 is needed, got {text}")
    return text.strip()


def read_claims(path: Path) -> list[tuple[str, Claim, list[Path]]]:
    """Claims of a JSON file; a mean keeps its digits."""
    if path.stat().st_size > MAX_LINE_BYTES:
        raise ValueError(f"{path} is too large")
    claims = []
    for row in json.loads(path.read_text(encoding="utf-8"), parse_float=str):
        number, steps, runs = (int(row[key]) for key in ("row", "steps", "n"))
        folder = path.parent / f"row{number:02}"
        claims.append((folder.name, Claim(steps, checked_mean(str(row["mean"])), runs), [folder]))
    return claims


def report(name: str, claim: Claim, finding: Finding) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in finding.counts.items() if count)
    # More digits than stated, so that a rounding can be followed.
    digits = len(claim.mean.partition(".")[2]) + 2
    lines = [
        f"{name}: {len(finding.trials)} runs found ({counts or 'none'}); claimed {claim.runs} runs, "
        f"mean {claim.mean} at step {claim.steps}",
        f"  at step {claim.steps}: n={len(finding.losses)} mean {finding.mean:.{digits}f} sd {finding.sd:.5f} "
        f"gate {finding.margin:.5f} t-test p {finding.p:.2g}".replace("nan", "-"),
        *(f"  does not follow: {plain(reason)}" for reason in finding.reasons),
        *(f"  note: {plain(remark)}" for remark in finding.remarks),
    ]
    return "\n".join(lines + ["  the claim follows from the logs"] * (not finding.reasons))


def describe(trial: Trial, metric: str) -> str:
    looks = trial.losses(metric)
    last = f"{metric} {looks[max(looks)]:.5f} at step {max(looks)}" if looks else f"no {metric}"
    time_s = trial.times_s.get(max(looks, default=0))
    seconds = f", {time_s:.3f} s" if time_s is not None else ""
    return plain(f"{trial.path} trial {trial.number}: {trial.status}, {len(looks)} looks, {last}{seconds}")


if __name__ == "__main__":
    sys.exit(main())
