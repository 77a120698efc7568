"""Download tokenized FineWeb from the Hugging Face hub. A shard gets its name when it is whole and its hash is right.

huggingface_hub transfers the files, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_XET_* and the proxy variables hold.
"""

import contextlib
import errno
import functools
import hashlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from aurora.tokens.manifest import read_manifest, write_manifest
from aurora.tokens.shards import GPT2_VOCAB_SIZE, ShardError, shard_bytes, verify_shard

STAGING = ".incomplete"  # folder, beside the shards, of files that are not whole or not checked
ATTEMPTS = 6
FIRST_WAIT_S = 1.0
# Failures of this machine's disk, which no second attempt mends.
LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


class HubDataset(NamedTuple):
    """A dataset repository with one validation shard, number 0, and train shards from number 1."""

    repo: str
    prefix: str
    num_train_shards: int
    revision: str  # commit that is downloaded; a branch is resolved once and then kept, in the manifest
    sha256: dict[str, str]  # of some files at that commit, checked whatever server answers

    def files(self, num_train_shards: int) -> list[str]:
        """Names of the validation shard and the first train shards."""
        numbers = range(1, num_train_shards + 1)
        return [f"{self.prefix}_val_000000.bin", *(f"{self.prefix}_train_{number:06d}.bin" for number in numbers)]


DATASETS = {
    # Revision and hashes are those that several public projects pin; see the repository's Git LFS ids.
    "fineweb10B": HubDataset(
        "kjj0/fineweb10B-gpt2",
        "fineweb",
        103,
        "889765ea1f903759787add96995d81171b632d0c",
        {
            "fineweb_val_000000.bin": "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640",
            "fineweb_train_000001.bin": "771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e",
        },
    ),
    "fineweb100B": HubDataset("kjj0/fineweb100B-gpt2", "fineweb", 1030, "main", {}),
    "finewebedu10B": HubDataset("kjj0/finewebedu10B-gpt2", "finewebedu", 99, "main", {}),
}


class RemoteFile(NamedTuple):
    num_bytes: int
    sha256: str


def download(
    dataset: HubDataset, num_train_shards: int, out: Path, revision: str | None = None, num_workers: int = 8
) -> None:
    """Bring the validation shard and the first num_train_shards train shards into folder out, with a manifest.

    Files that are there already stay; processes that start at once wait for the first. A cut connection is taken up
    where it broke. A process that is stopped leaves whole files; those under way are fetched anew.

    Raises:
        ShardError: a file that the hub does not have, whose hash is wrong, or that could not be fetched.
        OSError: ENOSPC when the disk is too small, before anything is fetched; other failures to write.
    """
    if not missing_files(dataset, num_train_shards, out, revision):
        return
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        missing = missing_files(dataset, num_train_shards, out, revision)  # another process may have been at it
        if not missing:
            return
        shutil.rmtree(out / STAGING, ignore_errors=True)  # parts of files that nothing can go on from
        manifest = read_manifest(out) or {"source": {"repo": dataset.repo}, "shards": {}}
        known = manifest["source"].get("revision")
        commit, remote = describe_remote(dataset, missing, revision or known or dataset.revision)
        if known not in (None, commit):
            raise ShardError(out, "revision of the shards", commit, known, "use another --out")
        manifest["source"]["revision"] = commit
        foreign = [name for name in missing if (out / name).exists() and name not in manifest["shards"]]
        for name in foreign:
            manifest["shards"][name] = adopt(out / name, remote[name])
        write_manifest(out, manifest)
        wanted = {name: remote[name] for name in missing if name not in foreign}
        fetch(dataset.repo, commit, wanted, out, manifest, num_workers)
        shutil.rmtree(out / STAGING, ignore_errors=True)


def missing_files(dataset: HubDataset, num_train_shards: int, out: Path, revision: str | None) -> list[str]:
    """Names of what is not in folder out. Raises ShardError when the folder holds another dataset or commit."""
    manifest = read_manifest(out)
    names = dataset.files(num_train_shards)
    if not manifest:
        return names
    source = manifest["source"]
    if source.get("repo") != dataset.repo:
        raise ShardError(out, "source of the shards", dataset.repo, source.get("repo", "text"), "use another --out")
    if revision and is_commit(revision) and revision != source.get("revision", revision):
        raise ShardError(out, "revision of the shards", revision, source["revision"], "use another --out")
    return [name for name in names if not is_present(out / name, manifest)]


def is_commit(revision: str) -> bool:
    return bool(re.fullmatch("[0-9a-f]{40}", revision))


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time work in a folder; the others wait."""
    from filelock import FileLock, Timeout  # comes with huggingface_hub

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process works in {folder}, waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_present(path: Path, manifest: dict[str, Any]) -> bool:
    """Whether a shard of the manifest is here, going by its size; check_folder() looks inside."""
    entry = manifest["shards"].get(path.name)
    return bool(entry) and path.is_file() and path.stat().st_size == shard_bytes(entry["num_tokens"])


def adopt(path: Path, remote: RemoteFile) -> dict[str, Any]:
    """The manifest's entry of a file that another tool brought here. Raises ShardError when it is a different one."""
    sha256 = file_sha256(path)
    if sha256 != remote.sha256:
        raise ShardError(path, "sha256", remote.sha256, sha256, "move this file away and run the same command again")
    return shard_entry(path, sha256)


def describe_remote(dataset: HubDataset, names: list[str], revision: str) -> tuple[str, dict[str, RemoteFile]]:
    """The commit of a revision, and sizes and hashes of files there. Raises ShardError."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ShardError(
            dataset.repo, "files", f"{len(names)} more: {listed}", "HF_HUB_OFFLINE", "copy them here first"
        )
    api = huggingface_hub.HfApi()

    def describe_part(part: list[str]) -> list[Any]:
        ask = functools.partial(api.get_paths_info, dataset.repo, part, repo_type="dataset", revision=commit)
        return with_retries(ask, dataset.repo)

    ask_commit = functools.partial(api.dataset_info, dataset.repo, revision=revision)
    commit = revision if is_commit(revision) else with_retries(ask_commit, dataset.repo).sha
    found = [entry for start in range(0, len(names), 100) for entry in describe_part(names[start : start + 100])]
    remote = {entry.path: RemoteFile(entry.size, entry.lfs.sha256) for entry in found if getattr(entry, "lfs", None)}
    for name in names:
        if name not in remote:
            fix = "lower --train-shards, or check --revision"
            raise ShardError(f"{dataset.repo}@{commit}", "files with a hash", name, "no such file", fix)
        pinned = dataset.sha256.get(name) if commit == dataset.revision else None
        if pinned and pinned != remote[name].sha256:
            raise ShardError(
                f"{dataset.repo}@{commit}/{name}", "sha256", pinned, remote[name].sha256, "check HF_ENDPOINT"
            )
    return commit, remote


def fetch(
    repo: str, commit: str, files: dict[str, RemoteFile], out: Path, manifest: dict[str, Any], num_workers: int
) -> None:
    """Fetch files side by side, each into out under its name once it is whole and checked, with a line for each."""
    from tqdm import tqdm

    total_bytes = sum(file.num_bytes for file in files.values())
    free_bytes = shutil.disk_usage(out).free
    if free_bytes < total_bytes:
        need, free = f"{total_bytes / 2**30:.2f} GiB", f"{free_bytes / 2**30:.2f} GiB"
        message = f"{need} are needed for {len(files)} files, {free} are free: fewer --train-shards or another --out"
        raise OSError(errno.ENOSPC, message, str(out))
    manifest_lock = threading.Lock()
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=repo, disable=None, smoothing=0.1) as bar:

        def fetch_one(name: str) -> None:
            entry = fetch_checked(repo, commit, name, files[name], out, bar)
            with manifest_lock:
                manifest["shards"][name] = entry
                write_manifest(out, manifest)
                bar.write(
                    f"{name}: {entry['num_tokens']:,} tokens, {len(manifest['shards'])} shards here", file=sys.stdout
                )

        with ThreadPoolExecutor(num_workers) as executor:
            futures = [executor.submit(fetch_one, name) for name in files]
            try:
                for done in as_completed(futures):
                    done.result()
            except BaseException:
                executor.shutdown(cancel_futures=True)  # those under way end first, and are kept
                raise


def fetch_checked(repo: str, commit: str, name: str, remote: RemoteFile, out: Path, bar: Any) -> dict[str, Any]:
    """Fetch one file, check hash and tokens, give it its name; returns its entry of the manifest."""
    from huggingface_hub import hf_hub_download

    staging, bar_class = out / STAGING, forwarding_bar(bar)

    def get() -> str:
        return hf_hub_download(
            repo, name, repo_type="dataset", revision=commit, local_dir=staging, tqdm_class=bar_class
        )

    staged = Path(with_retries(get, f"{repo}/{name}"))
    sha256 = file_sha256(staged)
    if sha256 != remote.sha256:
        staged.unlink()
        raise ShardError(f"{repo}@{commit}/{name}", "sha256", remote.sha256, sha256, "run the same command again")
    entry = shard_entry(staged, sha256)
    staged.replace(out / name)
    return entry


def forwarding_bar(bar: Any) -> type:
    """A class of invisible progress bars that add what they are told to another bar."""
    from tqdm import tqdm

    class Forwarding(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            with bar.get_lock():
                bar.update(n)

    return Forwarding


def with_retries(action: Callable[[], Any], what: str) -> Any:
    """The result of an action on the hub, tried again after a wait when the failure may pass.

    Raises:
        ShardError: the last failure, or one that will not pass.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:  # transport errors differ between versions of huggingface_hub
            if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
                raise
            answer = next((e for e in (error, error.__cause__) if isinstance(e, HfHubHTTPError)), None)
            response = answer.response if answer else None
            status = response.status_code if response is not None else None
            is_final = status is not None and 400 <= status < 500 and status not in (408, 429)
            if is_final or isinstance(error, OfflineModeIsEnabled) or attempt == ATTEMPTS:
                reason = " ".join(str(answer or error).split()) or type(error).__name__
                fix = "check name, token and network, then run the same command again"
                raise ShardError(what, "answer of the hub", "the file", reason, fix) from error
            wait_s = FIRST_WAIT_S * 2 ** (attempt - 1)
            if response is not None and (asked := response.headers.get("Retry-After", "")).isdigit():
                wait_s = max(wait_s, float(asked))
            print(f"{what}: {type(error).__name__}, trying again in {wait_s:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait_s)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_entry(path: Path, sha256: str) -> dict[str, Any]:
    """What the manifest says of a shard, which is read and checked for it."""
    info = verify_shard(path, GPT2_VOCAB_SIZE)
    return {"num_tokens": info.num_tokens, "sha256": sha256, "tokens_sha256": info.sha256}
