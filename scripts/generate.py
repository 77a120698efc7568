"""Let a finished run write.

    python scripts/generate.py runs/RUN.jsonl --prompt "def " --max-tokens 200
    python scripts/generate.py runs/quick --seed 1 --n 3 --temperature 0.8 --top-k 40

RUN is a record, a run id in runs/, or a folder with one run. Its weights lie beside the record. Text appears as it is
drawn, and ends where a document does, or after --max-tokens. Equal seeds give equal text on one machine.

Exit codes: 0 done, 2 usage, 3 GPT-2's vocabulary is not to be had, 4 weights or code that cannot be used.
"""

import argparse
import codecs
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.console import run_script
from aurora.errors import HarnessError
from scripts.analysis.text import printable


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a record, a run id in runs/, or a folder with one run")
    parser.add_argument("--prompt", default="", help="what the text begins with (nothing)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest sample [tokens] (256)")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="number of samples (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest token (1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the fewest with probability P together")
    parser.add_argument("--trust", action="store_true", help="run a model's code that is not this checkout's")
    args = parser.parse_args(argv)
    for name, is_right, wanted in (
        ("max-tokens", args.max_tokens >= 1, "at least 1"),
        ("n", args.n >= 1, "at least 1"),
        ("seed", 0 <= args.seed < 2**63, "in [0, 2^63)"),
        ("temperature", 0 <= args.temperature <= 100, "in [0, 100]"),
        ("top-k", args.top_k is None or args.top_k >= 1, "at least 1"),
        ("top-p", args.top_p is None or 0 < args.top_p <= 1, "in (0, 1]"),
    ):
        if not is_right:
            parser.error(f"--{name} must be {wanted}, got {vars(args)[name.replace('-', '_')]}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        write(args)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.reason)
    return 0


def write(args: argparse.Namespace) -> None:
    """All samples to standard output. Raises HarnessError."""
    from scripts.models.load import find_record, load
    from scripts.models.sampling import Sampling, sample, seeded
    from scripts.models.vocabulary import Vocabulary

    trained = load(find_record(args.run), args.trust)
    vocabulary = Vocabulary(trained.config["vocab_size"])
    prompt = [vocabulary.document_start, *vocabulary.encode(args.prompt).tolist()]
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.max_tokens)
    generator = seeded(args.seed)
    for number in range(args.n):
        if args.n > 1:
            print(f"--- {number + 1} of {args.n}")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        print(printable(args.prompt), end="", flush=True)
        for token in sample(trained, prompt, sampling, generator):
            print(printable(decoder.decode(vocabulary.bytes_of(token))), end="", flush=True)
        print(printable(decoder.decode(b"", final=True)))


if __name__ == "__main__":
    sys.exit(run_script(main))
