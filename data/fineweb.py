"""Make token shards of FineWeb: download them ready-made, or make them from text, and check them.

    python data/fineweb.py download --for configs/gpt2_small.toml --optimizer muon    what that run needs
    python data/fineweb.py download --train-shards 18                                 the first 18 train shards, 3.8 GB
    python data/fineweb.py tokenize --sample sample-10BT --train-shards 18 --out data/fineweb_raw
    python data/fineweb.py tokenize --files a.parquet b.jsonl c.txt --out data/fineweb_mine
    python data/fineweb.py convert train.bin val.bin --out data/mine     tokens of nanoGPT (uint16) or of .npy files
    python data/fineweb.py check data/fineweb10B                                      every byte, before a run

After a stop the same command goes on after the last whole file. Exit codes: 0 done, 2 usage, 3 data, 7 disk.
"""

import argparse
import os
import shlex
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.config import Config, load_config
from aurora.console import run_script
from aurora.errors import Exit, HarnessError
from aurora.tokens.loader import PUBLIC_SHARD_TOKENS, steps_in_shard
from aurora.tokens.manifest import read_manifest
from aurora.tokens.shards import GPT2_VOCAB_SIZE, ShardError
from data.check import Problem, check_folder
from data.convert import convert
from data.encode import HubText, LocalFiles, tokenize
from data.hub import DATASETS, download


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="download | tokenize | convert | check")

    get = commands.add_parser("download", help="get ready-made shards from the Hugging Face hub")
    get.set_defaults(run=run_download)
    amount = get.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--train-shards", type=positive, metavar="N", help="get the first N train shards and the validation shard"
    )
    amount.add_argument(
        "--for", dest="config", type=Path, metavar="CONFIG", help="get as many as a run of this track reads"
    )
    get.add_argument("--optimizer", metavar="NAME", help="with --for: the run's optimizer")
    get.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=V",
        help="with --for: the run's --set options",
    )
    get.add_argument("--dataset", choices=DATASETS, help="default: that of the track, else fineweb10B")
    get.add_argument("--revision", help="commit or branch of the dataset instead of the pinned one")
    get.add_argument("--out", type=Path, help="folder of the shards (default: data/DATASET)")
    get.add_argument("--workers", type=positive, default=8, metavar="N", help="files at a time (8)")

    make = commands.add_parser("tokenize", help="make shards from text with tiktoken's gpt2")
    make.set_defaults(run=run_tokenize)
    text = make.add_mutually_exclusive_group(required=True)
    text.add_argument("--sample", help="stream this sample from the hub: sample-10BT, sample-100BT, ...")
    text.add_argument(
        "--files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="read these: .txt (one document, or <|endoftext|> between several), .jsonl[.gz], .parquet",
    )
    make.add_argument("--repo", help="with --sample: the dataset (default: HuggingFaceFW/fineweb)")
    make.add_argument(
        "--revision", help="with --sample: its commit or branch (default: that of the first run, else main)"
    )
    make.add_argument("--out", type=Path, required=True, help="folder of the shards")
    make.add_argument(
        "--train-shards", type=positive, metavar="N", help="stop after N train shards (default: take all of the text)"
    )
    make.add_argument(
        "--shard-tokens",
        type=shard_size,
        default=PUBLIC_SHARD_TOKENS,
        metavar="N",
        help="tokens of a shard (100 million)",
    )
    make.add_argument(
        "--workers",
        type=positive,
        default=available_cores(),
        metavar="N",
        help="processes, unless gigatoken encodes (one for each core)",
    )

    other = commands.add_parser("convert", help="make shards of tokens: .npy files, or .bin of uint16 without a header")
    other.set_defaults(run=run_convert)
    other.add_argument("files", nargs="+", type=Path, metavar="FILE", help="each becomes shards of its name")
    other.add_argument("--out", type=Path, required=True, help="folder of the shards")
    other.add_argument(
        "--shard-tokens",
        type=shard_size,
        default=PUBLIC_SHARD_TOKENS,
        metavar="N",
        help="of a shard, at most (100 million)",
    )

    check = commands.add_parser("check", help="read every shard and list what is wrong with it")
    check.set_defaults(run=run_check)
    check.add_argument("folder", type=Path, help="folder of the shards")
    check.add_argument(
        "--vocab-size", type=positive, default=GPT2_VOCAB_SIZE, metavar="N", help="vocabulary of the model (50257)"
    )
    args = parser.parse_args(argv)
    if args.run is run_download and not args.config and (args.optimizer or args.overrides):
        get.error("--optimizer and --set go with --for")
    if args.run is run_tokenize and args.files and (args.repo or args.revision):
        make.error("--repo and --revision go with --sample")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def shard_size(text: str) -> int:
    number = positive(text)
    if number >= 2**31:
        raise argparse.ArgumentTypeError(f"{text} is more than a shard's header can say, at most 2^31 - 1")
    return number


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_download(args: argparse.Namespace) -> int:
    name, num_train_shards = args.dataset or "fineweb10B", args.train_shards
    if args.config:
        config = load_config(args.config, args.optimizer or "aurora", args.overrides)
        if not args.dataset:
            name = Path(config.data.train).parent.name
            if name not in DATASETS:
                message = f"{args.config} reads {config.data.train}, none of {', '.join(DATASETS)}; give --dataset"
                raise HarnessError(Exit.CONFIG, message)
        num_train_shards = shards_needed(config)
        print(
            f"{config.train.steps:,} steps of {config.train.batch_tokens:,} tokens need {num_train_shards} train shards"
        )
        if config.data.allow_epochs:
            num_train_shards = min(num_train_shards, DATASETS[name].num_train_shards)
    dataset, out = DATASETS[name], args.out or ROOT / "data" / name
    if num_train_shards > dataset.num_train_shards:
        have = f"{dataset.num_train_shards} in {dataset.repo}"
        raise ShardError(name, "train shards", f"{num_train_shards}", have, "use a larger --dataset or fewer steps")
    download(dataset, num_train_shards, out, args.revision, args.workers)
    print(f"{out}: the validation shard and {num_train_shards} train shards are here; check reads every byte of them")
    return 0


def shards_needed(config: Config) -> int:
    """How many shards of the public size the steps of a run take."""
    steps_each = steps_in_shard(PUBLIC_SHARD_TOKENS, config.train.batch_tokens)
    if not steps_each:
        message = f"train.batch_tokens must be less than a shard's {PUBLIC_SHARD_TOKENS:,}"
        raise HarnessError(Exit.CONFIG, f"{message}, got {config.train.batch_tokens:,}")
    return -(-config.train.steps // steps_each)


def run_convert(args: argparse.Namespace) -> int:
    for line in convert(args.files, args.out, args.shard_tokens):
        print(line, flush=True)
    print(f"train on it:  --set 'data.train={args.out.resolve()}/NAME_*.bin', and data.val alike")
    return 0


def run_tokenize(args: argparse.Namespace) -> int:
    begun = (read_manifest(args.out) or {"source": {}})["source"].get("revision")
    if args.files:
        source: LocalFiles | HubText = LocalFiles(args.files)
    else:
        source = HubText(args.repo or "HuggingFaceFW/fineweb", args.sample, args.revision or begun or "main")
    tokenize(source, args.out, args.shard_tokens, args.train_shards, args.workers)
    if list(args.out.glob("fineweb_train_*.bin")):
        overrides = [
            "--set " + shlex.quote(f"data.{split}={args.out.resolve()}/fineweb_{split}_*.bin")
            for split in ("train", "val")
        ]
        print(f"train on it:  python train_gpt.py --config configs/gpt2_small.toml {' '.join(overrides)}")
    else:
        print("note: all of the text is in the validation shard; --shard-tokens N makes smaller ones, in another --out")
    return 0


def run_check(args: argparse.Namespace) -> int:
    num_problems = 0
    for line in check_folder(args.folder, args.vocab_size):
        if isinstance(line, Problem):
            num_problems += 1
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            print(line, flush=True)
    print(f"{num_problems or 'no'} problem{'s' * (num_problems != 1)}")
    return Exit.DATA if num_problems else 0


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    args = parse_args(argv)
    try:
        return int(args.run(args))
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.reason)
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(Exit.DATA)
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed; pip install -e '.[data]'",
            file=sys.stderr,
        )
        return int(Exit.CONFIG)
    except BrokenProcessPool:
        print(
            "error: a worker process was killed, perhaps for its memory; run this again with fewer --workers",
            file=sys.stderr,
        )
        return int(Exit.DATA)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return int(Exit.DISK)


if __name__ == "__main__":
    if "download" in sys.argv[1:2]:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # files under way would take minutes to end, and are not kept
    sys.exit(run_script(main))
