"""The command of a script that computes a page of results/ from records: writes it, or checks it."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parents[2] / "results"


class Picture(NamedTuple):
    """digest: of the values that it shows; its file holds it. draw: writes that file, given its path and the digest."""

    digest: str
    draw: Callable[[Path, str], None]

    def is_current(self, path: Path) -> bool:
        return path.is_file() and self.digest.encode() in path.read_bytes()


class Written(NamedTuple):
    text: str
    pictures: Mapping[Path, Picture] = MappingProxyType({})


def page_command(
    script: str, description: str, page: str, source: str, make: Callable[[Path], Written], argv: list[str] | None
) -> int:
    """Write the page and the pictures that changed; with --check exit 1 if one is stale. Bad records exit 2.

    script: by whose name users call it. page, source: names in results/ of what is written and what names the records.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the page is stale")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records and the page")
    args = parser.parse_args(argv)
    path = args.results / page
    if not args.results.is_dir():
        print(f"error: there is no folder {args.results}", file=sys.stderr)
        return 2
    try:
        text, pictures = make(args.results)
        stale = [p for p, picture in pictures.items() if not picture.is_current(p)]
        if not args.check:
            for p in stale:
                pictures[p].draw(p, pictures[p].digest)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale = [path, *stale]
    except ImportError as error:
        print(f"error: {error}; pip install -e '.[report]'", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {error!r}: is {args.results / source} right, and are its records whole?", file=sys.stderr)
        return 2
    if args.check:
        for p in stale:
            print(f"error: {p} is not what the records give: python scripts/{script}", file=sys.stderr)
        return 1 if stale else 0
    print(path)
    return 0
