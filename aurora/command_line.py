"""What train_gpt.py is told on its command line. Needs nothing but Python."""

import argparse
import importlib.util
from pathlib import Path

from aurora.config import ROOT
from aurora.errors import Exit


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Of the command line of train_gpt.py, which description explains."""
    parser = argparse.ArgumentParser(
        prog="train_gpt.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=track_path, default=ROOT / "configs" / "quick.toml", help="track (configs/quick.toml)"
    )
    parser.add_argument(
        "--optimizer",
        default="aurora",
        help="name of an [optimizer.NAME] table of the track (aurora), or any other: module:Class, as torch.optim:SGD",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights (0)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the record <run_id>.jsonl (runs)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=V",
        help="override one value of the track; configs/README.md explains the keys",
    )
    parser.add_argument("--resume", action="store_true", help="go on from this run's newest checkpoint in --out")
    parser.add_argument(
        "--wandb", choices=("online", "offline", "off"), default="off", help="mirror the metrics to wandb"
    )
    parser.add_argument(
        "--dump-momentum",
        nargs=3,
        metavar=("PATTERN", "FIRST", "LAST"),
        help="write the momentum of matrices of these names at these steps to <run_id>.momentum/ beside the record",
    )
    parser.add_argument(
        "--price-per-gpu-hour", type=float, metavar="X", help="say what the run costs where an hour of a GPU costs X"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=60.0, help="seconds until a rank that stands still ends the run (60)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print parameters, data, memory and time that the run needs, then stop"
    )
    return parser


def parse_args(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of train_gpt.py. Exits where it asks for help or is wrong."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    if not 0 < args.timeout_s <= 1e6:
        parser.error(f"--timeout-s must be above 0 and at most 1e6, got {args.timeout_s:g}")
    if args.price_per_gpu_hour is not None and not 0 <= args.price_per_gpu_hour <= 1e6:
        parser.error(f"--price-per-gpu-hour must be from 0 to 1e6, got {args.price_per_gpu_hour:g}")
    if missing := [name for name in ("torch", "numpy") if importlib.util.find_spec(name) is None]:
        remedy = "source .venv/bin/activate, which scripts/quickstart.sh makes, or pip install -e '.[train]'"
        parser.exit(int(Exit.CONFIG), f"error: this python has no {' and no '.join(missing)}; {remedy}\n")
    return args


def track_path(text: str) -> Path:
    """A track by its path from the folder where one is, or from the checkout."""
    path = Path(text)
    return ROOT / path if not path.exists() and (ROOT / path).exists() else path
