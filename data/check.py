"""Find everything that can be wrong with a folder of shards, before a run depends on them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from aurora.tokens.manifest import NAME, check_against_manifest, read_manifest
from aurora.tokens.overlap import check_val_is_unseen
from aurora.tokens.shards import ShardError, ShardInfo, check_numbering, fingerprint, open_shard, verify_shard
from data.hub import DATASETS, file_sha256

PUBLIC_VAL_TOKENS = 10_485_760


class Problem(str):
    """A line about something that must be mended."""


def check_folder(folder: Path, vocab_size: int) -> Iterator[str]:
    """Read every shard of a folder; yields a line for each thing found, as a Problem where a run would be wrong.

    Checked are headers, sizes, tokens, hashes against the manifest, numbering, and validation tokens in train shards.
    """
    if not folder.is_dir():
        yield Problem(ShardError(folder, "folder", "one with shards", "none", "check its name"))
        return
    paths = sorted(path for path in folder.glob("*.bin") if not path.name.startswith("."))  # as macOS leaves
    if not paths:
        yield Problem(ShardError(folder, "files", "shards, *.bin", "none", "see data/fineweb.py download --help"))
        return
    manifest = None
    try:
        manifest = read_manifest(folder)
    except ShardError as error:
        yield Problem(error)
    listed = manifest["shards"] if manifest else {}
    for name in sorted(set(listed) - {path.name for path in paths}):
        yield Problem(ShardError(folder / name, "file", f"one, as {NAME} says", "none", "get it again"))
    try:
        check_numbering(paths)
    except ShardError as error:
        yield Problem(error)

    infos: dict[Path, ShardInfo] = {}
    for path in paths:
        try:
            info = verify_shard(path, vocab_size)
            check_against_manifest(path, info, manifest)
            twin = next((other for other, seen in infos.items() if seen.sha256 == info.sha256), None)
            if twin:
                raise ShardError(
                    path, "tokens", "other ones than in any other shard", f"those of {twin.name}", "drop one"
                )
            sha256 = file_sha256(path)
            if path.name in listed and sha256 != listed[path.name]["sha256"]:
                raise ShardError(path, "sha256", f"{listed[path.name]['sha256']} ({NAME})", sha256, "get it again")
        except ShardError as error:
            yield Problem(error)
            continue
        infos[path] = info
        known = next((name for name, dataset in DATASETS.items() if dataset.sha256.get(path.name) == sha256), None)
        origin = (
            "as in the manifest" if path.name in listed else f"the public {known}" if known else "not in a manifest"
        )
        yield f"{path.name}: {info.num_tokens:,} tokens, sha256 {sha256[:16]}... ({origin})"

    val_paths = [path for path in infos if "_val_" in path.name]
    train = [(path, open_shard(path)) for path in infos if path not in val_paths]
    for path in val_paths:
        used = open_shard(path)[: PUBLIC_VAL_TOKENS + 1]
        name = f"{path.name}: its first {len(used):,} tokens"
        try:
            share = check_val_is_unseen(path, used, train, vocab_size)
            yield f"{name}: {share:.3%} of them stand in train shards too, in runs of 1,024 or more"
        except ShardError as error:
            yield Problem(error)
        yield f"{name}: fingerprint {hashlib.sha256(used.data).hexdigest()}"
    num_tokens = sum(infos[path].num_tokens for path, _ in train)
    yield f"{len(train)} train shards, {num_tokens:,} tokens, fingerprint {fingerprint(infos[p] for p, _ in train)}"
