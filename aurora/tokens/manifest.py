"""manifest.json beside the shards of a data set: where they come from and what they must hash to.

    {"source": {...}, "shards": {"fineweb_val_000000.bin": {"num_tokens": N, "sha256": "...", "tokens_sha256": "..."}}}

sha256 is of the whole file, as on the hub; tokens_sha256 of the tokens alone, as in the records of runs. Other keys
belong to the tool that wrote the shards.
"""

import json
import os
from pathlib import Path
from typing import Any

from aurora.tokens.shards import ShardError, ShardInfo

NAME = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None when there is none. Raises ShardError for one that cannot be read."""
    path = folder / NAME
    wanted, fix = "source and shards as data/fineweb.py writes them", "get the folder again, or move this file away"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        is_valid = isinstance(manifest["source"], dict) and all(
            isinstance(entry["num_tokens"], int)
            and all(isinstance(entry[key], str) for key in ("sha256", "tokens_sha256"))
            for entry in manifest["shards"].values()
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ShardError(path, "content", wanted, error.strerror, fix) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise ShardError(path, "content", wanted, "something else", fix)
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step. One process at a time, see alone_in() in data/hub.py."""
    temporary = folder / f".{NAME}.new"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def check_against_manifest(path: Path, info: ShardInfo, manifest: dict[str, Any] | None) -> None:
    """Raise ShardError when the manifest beside a shard knows other tokens under its name."""
    entry = (manifest or {"shards": {}})["shards"].get(path.name)
    if entry and entry["tokens_sha256"] != info.sha256:
        raise ShardError(
            path, "sha256 of the tokens", f"{entry['tokens_sha256']} ({NAME})", info.sha256, "get the file again"
        )
