"""Measure the data path: making shards, checking them, handing out batches. Prints a Markdown table.

    python scripts/benchmark_data.py

It needs the extra `data` and GPT-2's vocabulary, from the network or TIKTOKEN_CACHE_DIR.
"""

import argparse
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


def tokenizing(folder: Path, megabytes: int, rounds: int) -> list[str]:
    """Whole processes, interleaved A B B A, on the sources of Python's library, several times over."""
    text = folder / "text.jsonl"
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    with text.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            file.writelines(json.dumps({"text": source}) + "\n" for source in sources)
    pairs = []
    for number in range(rounds):
        out = folder / f"shards{number}"
        ours = [sys.executable, ROOT / "data" / "fineweb.py", "tokenize", "--files", text, "--out", out]
        commands = {"ours": ours, "loop": [sys.executable, "-c", PLAIN_LOOP, text, folder / "plain.bin"]}
        times = {}
        for name in ("ours", "loop") if number % 2 else ("loop", "ours"):
            times[name] = seconds(partial(subprocess.run, commands[name], check=True, stdout=subprocess.DEVNULL))
        pairs.append((times["ours"], times["loop"]))
    assert np.array_equal(np.fromfile(folder / "plain.bin", dtype="<u2"), open_shard(out / "fineweb_val_000000.bin"))
    ours_s, loop_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(loop / ours for ours, loop in pairs)
    name = f"tokenize {text.stat().st_size / 1e6:.0f} MB of jsonl, {len(os.sched_getaffinity(0))} cores"
    return [f"| {name} | {ours_s:.2f} s | plain loop over tiktoken {loop_s:.2f} s | {ratio:.2f}x faster |"]


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
        f"| validation in it for {len(val) / 1e6:.0f}M validation tokens | {unseen_s:.2f} s | | |",
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
    parser.add_argument("--text-mb", type=int, default=150, help="megabytes of text to tokenize (150)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens of a shard (100 million)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = tokenizing(folder, args.text_mb, args.rounds)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        lines += checking(folder, args.shard_tokens, args.rounds)
        lines += loading(folder, 524_288, args.rounds)
    print(f"numpy {np.__version__}, medians of {args.rounds} rounds, all but tokenize on one core", end="\n\n")
    print("| what | result | against | ratio |\n|---|---|---|---|", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
