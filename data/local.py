"""Make a corpus without a download: bytes of the Python standard library's sources, or of your own text files.

    python data/local.py                          the corpus of configs/quick.toml, in data/local/
    python data/local.py --text a.txt b.txt --out data/mine

Every byte is a token (vocab_size 256). Of the standard library all .py files are taken but tests and generated tables.
A hash of the path puts about 6 % of them into the validation shard. Of your own files, the last 10 % of each are
validation. Each split is cut into passages of 512 bytes, each behind a zero byte, in the order of a hash of path and
offset. The loader reads a batch in one piece, and in file order that would be a piece of a single file. Equal input
gives equal bytes.
"""

import argparse
import hashlib
import shlex
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.console import run_script
from aurora.tokens.loader import steps_in_shard
from aurora.tokens.shards import ShardError, fingerprint, verify_shard, write_shard  # noqa: E402

DOCUMENT_START = b"\0"
VOCAB_SIZE = 256
PASSAGE_BYTES = 512
SKIPPED_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
GENERATED_DIRS = {"encodings", "pydoc_data"}
VAL_HASH_SHARE = 16  # of 256
TEXT_VAL_SHARE = 0.1
# Of the train tokens of the runs in results/, which Python 3.11.7 made.
RECORDED_TRAIN_SHA256 = "4721fac079912e2d14f413976b0d977bea818221a50ae8346d21e5f776c6792f"


def standard_library_files(root: Path) -> list[str]:
    """Sorted POSIX paths, relative to root, of the sources that every installation of this version has."""
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # _sysconfigdata_*.py is written when Python is built and differs from machine to machine.
        if not (SKIPPED_DIRS | GENERATED_DIRS).intersection(parts) and not path.name.startswith("_sysconfigdata"):
            files.append("/".join(parts))
    return sorted(files)


def is_validation(relative_path: str) -> bool:
    """Whether a hash of its path puts this document into the validation shard."""
    return hashlib.sha256(relative_path.encode()).digest()[0] < VAL_HASH_SHARE


def standard_library_split(root: Path) -> tuple[bytes, bytes]:
    """(train, val) bytes of the standard library below root."""
    documents = {path: (root / path).read_bytes() for path in standard_library_files(root)}
    train = {path: text for path, text in documents.items() if not is_validation(path)}
    val = {path: text for path, text in documents.items() if is_validation(path)}
    return shuffled_passages(train), shuffled_passages(val)


def text_split(paths: list[Path]) -> tuple[bytes, bytes]:
    """(train, val) bytes of one's own files: the end of every file is validation."""
    train, val = {}, {}
    for number, path in enumerate(paths):
        text = path.read_bytes()
        cut = len(text) - int(len(text) * TEXT_VAL_SHARE)
        train[f"{number}"], val[f"{number}"] = text[:cut], text[cut:]
    return shuffled_passages(train), shuffled_passages(val)


def shuffled_passages(documents: dict[str, bytes]) -> bytes:
    """The documents' passages, each behind a zero byte, in the order of a hash of document name and offset."""
    places = [(name, offset) for name, text in documents.items() for offset in range(0, len(text), PASSAGE_BYTES)]
    places.sort(key=lambda place: hashlib.sha256(f"{place[0]}:{place[1]}".encode()).digest())
    return b"".join(DOCUMENT_START + documents[name][offset : offset + PASSAGE_BYTES] for name, offset in places)


def size_overrides(train: bytes, val: bytes) -> dict[str, int]:
    """What configs/quick.toml must be told when a corpus is smaller than it expects."""
    quick = tomllib.loads((ROOT / "configs" / "quick.toml").read_text(encoding="utf-8"))
    seq_len, batch_tokens = quick["model"]["seq_len"], quick["train"]["batch_tokens"]
    # A multiple of four sequences, so that four ranks can share it.
    fitting = {
        "train.steps": steps_in_shard(len(train), batch_tokens),
        "eval.tokens": (len(val) - 1) // (4 * seq_len) * 4 * seq_len,
    }
    own_steps = [table["steps"] for table in quick["optimizer"].values() if "steps" in table]
    wanted = {"train.steps": max(quick["train"]["steps"], *own_steps), "eval.tokens": quick["eval"]["tokens"]}
    return {key: fitting[key] for key in fitting if fitting[key] < wanted[key]}


def write_corpus(train: bytes, val: bytes, folder: Path) -> Iterator[str]:
    """Write one shard a split and yield a line about each, and one about both."""
    infos = []
    for split, content in (("train", train), ("val", val)):
        path = folder / f"local_{split}_000000.bin"
        write_shard(path, np.frombuffer(content, dtype=np.uint8))
        infos.append(verify_shard(path, VOCAB_SIZE))
        yield f"{path}: {infos[-1].num_tokens:,} tokens"
    yield f"fingerprint {fingerprint(infos)}"


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code: 0, or 3 when the text cannot be read, 7 when the disk refuses the shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="take these files instead of the standard library"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "local", help="folder of the shards")
    args = parser.parse_args(argv)
    if args.text and args.out == parser.get_default("out"):
        parser.error("--text needs --out: the default folder is the corpus of configs/quick.toml")
    try:
        train, val = text_split(args.text) if args.text else standard_library_split(_standard_library())
    except OSError as error:
        print(f"error: {error.filename} cannot be read: {error.strerror}", file=sys.stderr)
        return 3
    if args.text and 0 in size_overrides(train, val).values():
        print(
            f"error: {len(train) + len(val):,} bytes of text are too few to train on, give some 50,000", file=sys.stderr
        )
        return 3
    try:
        for line in write_corpus(train, val, args.out):
            print(line)
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"error: cannot write shards to {args.out}: {error.strerror}", file=sys.stderr)
        return 7
    tokens = np.frombuffer(train, np.uint8).astype("<u2").tobytes()
    if not args.text and hashlib.sha256(tokens).hexdigest() != RECORDED_TRAIN_SHA256:
        print("The runs in results/ learnt from the sources of Python 3.11.7, not from these: losses will differ.")
    if args.text:
        out = args.out.resolve()
        overrides = ["--set " + shlex.quote(f"data.{split}={out}/local_{split}_*.bin") for split in ("train", "val")]
        overrides += [f"--set {key}={value}" for key, value in size_overrides(train, val).items()]
        print(f"train on it:  python train_gpt.py {' '.join(overrides)}")
    return 0


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


if __name__ == "__main__":
    sys.exit(run_script(main))
