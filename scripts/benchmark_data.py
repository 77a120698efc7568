"""Measure the data path: making shards, checking them, handing out batches. Prints a Markdown table.

    python scripts/benchmark_data.py

It needs the extra `data` and GPT-2's vocabulary, from the network or TIKTOKEN_CACHE_DIR.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from aurora.console import run_script
from aurora.errors import Exit, HarnessError
from aurora.tokens.loader import TokenLoader
from aurora.tokens.overlap import check_val_is_unseen
from aurora.tokens.shards import GPT2_VOCAB_SIZE, open_shard, verify_shard, write_shard

NODE_TOKENS_PER_S = 3.6e6  # what the benchmark task takes on a node of 8 GPUs
PLAIN_LOOP = """
import json, sys, numpy as np, tiktoken
encoding, tokens = tiktoken.get_encoding("gpt2"), []
for line in open(sys.argv[1], encoding="utf-8"):
    tokens.append(50256)
    tokens.extend(encoding.encode_ordinary(json.loads(line)["text"]))
np.array(tokens, dtype=np.uint16).tofile(sys.argv[2])
"""


def seconds(action: Callable[[], object]) -> float:
    begin_ns = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - begin_ns) / 1e9


def write_text(path: Path, folders: list[Path], megabytes: int) -> int:
    """Lines of jsonl, one for each source file in the folders, which are taken again where they do not suffice.

    Returns how many times they were taken.
    """
    suffixes = {".py", ".md", ".txt", ".rst", ".h"}
    files = [
        file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix in suffixes and file.is_file()
    ]
    with path.open("w", encoding="utf-8") as out:
        for turn in itertools.count(1):
            for file in files:
                if out.tell() >= megabytes * 1e6:
                    return turn
                with contextlib.suppress(UnicodeDecodeError):
                    out.write(json.dumps({"text": file.read_text(encoding="utf-8")}) + "\n")
            if not out.tell():
                raise HarnessError(Exit.DATA, f"no text files in {', '.join(map(str, folders))}")
    raise AssertionError("itertools.count ended")


def tokenizing(folder: Path, sources: list[Path], megabytes: int, rounds: int) -> list[str]:
    """Whole processes, in alternating order: ours, ours without gigatoken, and a plain loop over tiktoken."""
    text, without = folder / "text.jsonl", folder / "without"
    if missing := [name for name in ("tiktoken", "gigatoken") if importlib.util.find_spec(name) is None]:
        raise HarnessError(Exit.DATA, f"missing: {', '.join(missing)}; pip install -e '.[data,fast-tokens]'")
    import tiktoken

    try:
        tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        message = "GPT-2's vocabulary is missing; download it once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        raise HarnessError(Exit.DATA, message) from error
    turns = write_text(text, sources, megabytes)
    without.mkdir()
    (without / "gigatoken.py").write_text("raise ImportError('left out for a comparison')\n")
    times: dict[str, list[float]] = {"gigatoken": [], "tiktoken": [], "loop": []}
    for number in range(rounds):
        ours = [sys.executable, ROOT / "data" / "fineweb.py", "tokenize", "--files", text, "--out"]
        commands = {
            "gigatoken": [*ours, folder / f"fast{number}"],
            "tiktoken": [*ours, folder / f"slow{number}"],
            "loop": [sys.executable, "-c", PLAIN_LOOP, text, folder / "plain.bin"],
        }
        for name in commands if number % 2 else reversed(commands):
            env = os.environ | ({"PYTHONPATH": str(without)} if name == "tiktoken" else {})
            run = partial(subprocess.run, commands[name], check=True, stdout=subprocess.DEVNULL, env=env)
            times[name].append(seconds(run))
        plain = np.fromfile(folder / "plain.bin", dtype="<u2")
        for kind in ("fast", "slow"):
            assert np.array_equal(plain, open_shard(folder / f"{kind}{number}" / "fineweb_val_000000.bin"))
    medians = {name: statistics.median(found) for name, found in times.items()}
    how_often = f"files taken {turns} times" if turns > 1 else "no file twice"
    cores = len(os.sched_getaffinity(0))
    name = f"tokenize {text.stat().st_size / 1e6:.0f} MB of jsonl ({how_often}), {cores} cores"
    return [
        f"| {name} | {medians['gigatoken']:.2f} s | {label} {medians[key]:.2f} s | "
        f"{statistics.median(b / a for a, b in zip(times['gigatoken'], times[key], strict=True)):.2f}x faster |"
        for key, label in (("tiktoken", "the same without gigatoken"), ("loop", "plain loop over tiktoken"))
    ]


def checking(folder: Path, num_tokens: int, rounds: int) -> list[str]:
    generator = np.random.default_rng(0)
    paths = [folder / "check_val_000000.bin", folder / "check_train_000001.bin"]
    for path, size in zip(paths, (num_tokens // 10, num_tokens), strict=True):
        write_shard(path, (GPT2_VOCAB_SIZE * generator.random(size) ** 3).astype(np.uint16))  # rare and frequent tokens
    val, train = map(open_shard, paths)
    verify_s = statistics.median(seconds(lambda: verify_shard(paths[1], GPT2_VOCAB_SIZE)) for _ in range(rounds))
    unseen = partial(check_val_is_unseen, paths[0], val, [(paths[1], train)], GPT2_VOCAB_SIZE)
    unseen_s = statistics.median(seconds(unseen) for _ in range(rounds))
    train_size = f"{num_tokens / 1e6:.0f}M tokens"
    return [
        f"| hash a shard of {train_size}, and check its tokens' range | {verify_s:.2f} s | | |",
        f"| look for {len(val) / 1e6:.0f}M validation tokens in it | {unseen_s:.2f} s | | |",
    ]


def loading(folder: Path, batch_tokens: int, rounds: int) -> list[str]:
    """Batches as int64, one core, from page cache; the whole node's, which 8 ranks would share."""
    train = open_shard(folder / "check_train_000001.bin")
    lines = []
    for world_size in (1, 8):
        loader = TokenLoader([train], batch_tokens, 0, world_size, lambda window: window.astype(np.int64))
        one_pass = partial(read_all, loader)
        one_pass()
        pass_s = statistics.median(seconds(one_pass) for _ in range(rounds))
        tokens_per_s = loader.ends[-1] * loader.own_tokens / pass_s
        name = f"load batches of {batch_tokens:,} tokens, a share of 1/{world_size}, 1 core"
        ratio = tokens_per_s / NODE_TOKENS_PER_S
        node = f"8 GPUs take {NODE_TOKENS_PER_S / 1e6:.1f}M tokens/s"
        lines.append(f"| {name} | {tokens_per_s / 1e6:,.0f}M tokens/s | {node} | {ratio:.0f}x |")
    return lines


def read_all(loader: TokenLoader) -> None:
    for step in range(loader.ends[-1]):
        loader.prepare(loader.window(step))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each part (5)")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--sources", type=Path, nargs="+", default=[stdlib], help="folders of text (Python's library)")
    parser.add_argument("--text-mb", type=int, default=150, help="megabytes of text to tokenize (150)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens of a shard (100 million)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            lines = tokenizing(folder, args.sources, args.text_mb, args.rounds)
        except HarnessError as error:
            print(f"error: {error}", file=sys.stderr)
            return int(error.reason)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        lines += checking(folder, args.shard_tokens, args.rounds)
        lines += loading(folder, 524_288, args.rounds)
    print(f"numpy {np.__version__}, medians of {args.rounds} rounds, all but tokenize on one core", end="\n\n")
    print("| what | result | against | ratio |\n|---|---|---|---|", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
