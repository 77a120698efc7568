"""Write the report that is shared: one HTML file with verdict, curves, tables, neurons, tuning and provenance of runs.

    python scripts/report.py runs/mine --out report.html
    python scripts/report.py runs/mine --watch --out report.html    writes it again while runs go on; Ctrl-C ends that

The file needs no server and no network, and can be opened from disk, mailed and put on any web page. Its numbers are
those of compare.py --json. A folder of tuning shows its ledger, too. Links lead to the raw records, from where the file
was written. With --watch the page reloads itself, and records are verified at the end. Each time takes a second or two
of one core, which runs that are timed on a CPU feel.
"""

import argparse
import base64
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.console import run_script
from aurora.trainer.record import Run, read_folder, record_paths
from scripts.analysis.text import plain

try:
    from scripts.analysis.report_data import page_data
    from scripts.verification.checks import verify_folder
except ImportError as error:
    print(f"error: {error}; pip install -e '.[report]'", file=sys.stderr)
    sys.exit(2)

WEB, UPLOT = ROOT / "scripts" / "web", ROOT / "scripts" / "vendor" / "uplot"
STYLES = (UPLOT / "uPlot.min.css", WEB / "report.css")
# In the order in which they run; each uses those before it.
SCRIPTS = (
    UPLOT / "uPlot.iife.min.js",
    *(WEB / f"{name}.js" for name in ("dom", "state", "plot", "curves", "bars", "neurons", "tuning", "provenance")),
    WEB / "main.js",
)


def render(data: dict[str, Any]) -> str:
    """The page with its styles, scripts and data in it. Its policy lets a browser load and run nothing else."""
    styles = [path.read_text(encoding="utf-8") for path in STYLES]
    scripts = [path.read_text(encoding="utf-8") for path in SCRIPTS]
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; script-src {allowed(scripts)}; "
        f"style-src {allowed(styles)}"
    )
    parts = {
        "policy": policy,
        "licence": (UPLOT / "LICENSE").read_text(encoding="utf-8").strip(),
        "styles": "\n".join(f"<style>{text}</style>" for text in styles),
        "data": as_element(data),
        "scripts": "\n".join(f"<script>{text}</script>" for text in scripts),
    }
    text = (WEB / "page.html").read_text(encoding="utf-8")
    before, *pieces = text.split("{{")
    for piece in pieces:
        name, _, after = piece.partition("}}")
        before += parts[name] + after
    return before


def allowed(texts: Iterable[str]) -> str:
    """Sources of a Content-Security-Policy: the inline texts with these hashes."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def as_element(data: dict[str, Any]) -> str:
    """JSON that no text in it can end: in HTML only < and & begin something."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write_report(runs: Sequence[Run], out: Path, folders: Sequence[Path] = (), warnings: Sequence[str] = ()) -> None:
    """Of finished work, with its records verified. runs: with all of their events. Raises OSError."""
    verdicts = {verdict.path: verdict for verdict in verify_folder(*(run.path.absolute() for run in runs))}
    own = {run.path: verdicts[run.path.absolute()] for run in runs}
    save(page_data(runs, out, folders, own, warnings), out)


def save(data: dict[str, Any], out: Path) -> None:
    """In one piece: a browser may read it at any time."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(render(data), encoding="utf-8")
    temporary.replace(out)


def watch(folders: Sequence[Path], out: Path, every_s: float) -> bool:
    """Write the page whenever records have changed, until Ctrl-C. Whether there was a record."""
    seen: list[tuple[Path, int]] = []
    try:
        while True:
            paths = [path for folder in folders for path in record_paths(folder)]
            now = [(path, size_of(path)) for path in paths]
            if now and now != seen:
                seen = now
                runs, errors = read_folder(*folders)
                if runs:
                    data = page_data(runs, out, folders, warnings=list(map(str, errors)))
                    save(data | {"refresh_s": every_s, "written": time.strftime("%H:%M:%S")}, out)
                    print(f"{out}: {len(runs)} runs", flush=True)
            time.sleep(every_s)
    except KeyboardInterrupt:
        return bool(seen)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # its run has just moved it
        return -1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="records, and ledgers of tuning")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=20.0, metavar="S", help="write it again every S seconds (20) if changed"
    )
    args = parser.parse_args(argv)
    if args.watch is not None and not 1 <= args.watch <= 86_400:
        parser.error(f"--watch must be from 1 to 86400 seconds, got {args.watch:g}")
    for folder in args.folders:
        if not folder.is_dir() and args.watch is None:
            parser.error(f"{plain(folder)} is no folder; name the one that holds the records")
    if args.out.is_dir():
        parser.error(f"--out {plain(args.out)} is a folder; name a file, as {plain(args.out / 'report.html')}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.watch is not None and not watch(args.folders, args.out, args.watch):
            return 0
        runs, errors = read_folder(*args.folders)
        for error in errors:
            print(f"warning: {plain(error, 500)}", file=sys.stderr)
        if not runs:
            print(f"error: no record in {plain(', '.join(map(str, args.folders)))}; name a folder with .jsonl records",
                  file=sys.stderr)  # fmt: skip
            return 2
        write_report(runs, args.out, args.folders, list(map(str, errors)))
    except OSError as error:
        print(f"error: {plain(args.out)} cannot be written: {error.strerror}; name another --out", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
