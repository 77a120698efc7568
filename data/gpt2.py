"""GPT-2's tokens: tiktoken's, which gigatoken finds several times as fast where it is installed and agrees."""

import base64
import functools
import itertools
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from aurora.tokens.shards import ShardError

# Unicode's white space, as tiktoken knows it. Its stack is too small for some 300,000 in a row before a letter.
LONG_SPACE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")
# What tokenizers differ in: contractions, digits, white space of all kinds, other scripts and their marks, emoji joined
# by invisible characters, control characters, special tokens as text, long words.
SAMPLES = (
    "It's WE'LL they've I'D don't 'tis ''s",
    "x = 3.14159e-10; y[1234567] ½ ² ١٢٣ 一二三 Ⅻ",
    " a  b   c\n\n\n d\t\t e \r\n\r\n f \n \n\n",
    "a\xa0b\u3000\u3000c\u2028d\u200be\x85\x0b\x0c  ",
    "Füße naïve e\u0301 o\u0308\u0323 ﬁ Ǆ ß İı Ω",
    "你好，世界。 こんにちは 안녕하세요 नमस्ते สวัสดี مرحبا שלום",
    "👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 \U0001f9ff\ufe0f",
    "\x00\x01\x1b[31m\x7f\ufeff\ufffd\U0010ffff",
    "<|endoftext|> a<|endoftext|>b <|im_start|>",
    "a" * 3000 + " " * 3000 + "b" + "ab" * 1000 + "\n" * 3000,
    "def f(self, *args):\n    return {k: v for k, v in args}  # https://example.org/a?b=c&d=%20",
)
CHECKED_CHARS = 2000  # of each batch


def gpt2() -> Any:
    """tiktoken's gpt2 encoding. Raises ShardError when its files are neither cached nor to be downloaded."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # ValueError: what a server sent has the wrong hash
        raise ShardError(
            "tiktoken",
            "GPT-2's vocabulary",
            "a download or a copy in the folder TIKTOKEN_CACHE_DIR",
            " ".join(str(error).split()),
            "fill that folder where there is a network, see README.md",
        ) from error


@functools.cache
def gigatoken_gpt2() -> Any:
    """gigatoken's tokenizer with tiktoken's vocabulary; None where it is not installed, or differs on a sample."""
    try:
        import gigatoken
    except ImportError:
        return None
    encoding = gpt2()
    with tempfile.TemporaryDirectory() as folder:
        # Its name says how text is split into words: r50k_base is GPT-2's encoding.
        vocabulary = Path(folder) / "r50k_base.tiktoken"
        ranks = sorted((encoding.encode_single_token(word), word) for word in encoding.token_byte_values())
        lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in ranks]
        vocabulary.write_text("".join(lines), encoding="ascii")
        try:
            tokenizer = gigatoken.Tokenizer.from_tiktoken(vocabulary, special_tokens={})
            is_equal = all(np.array_equal(tokenizer.encode(text), tiktoken_tokens(text)) for text in SAMPLES)
        except (AttributeError, TypeError, ValueError):  # of another version
            return None
    return tokenizer if is_equal else None


def describe_tokenizer() -> str:
    """Which library finds the tokens, for the console."""
    if gigatoken_gpt2() is None:
        return f"tokens by tiktoken {metadata.version('tiktoken')}"
    return f"tokens by gigatoken {metadata.version('gigatoken')}, compared with tiktoken's on a part of every batch"


def tokens_of(text: str) -> np.ndarray:
    """(num_tokens,) as of tiktoken's encode_ordinary, also where that fails."""
    tokenizer = gigatoken_gpt2()
    if tokenizer is None:
        return tiktoken_tokens(text)
    try:
        return np.asarray(tokenizer.encode(text.encode()))
    except UnicodeEncodeError:  # half of a surrogate pair
        return tiktoken_tokens(text)


def check_tokens(text: str) -> None:
    """Raise ShardError where the beginning of a text has other tokens than tiktoken's."""
    if gigatoken_gpt2() is not None and not np.array_equal(
        tokens_of(text[:CHECKED_CHARS]), tiktoken_tokens(text[:CHECKED_CHARS])
    ):
        fix = "pip uninstall gigatoken, then begin in another --out"
        raise ShardError("gigatoken", "tokens", "those of tiktoken", f"others of {ascii(text[:40])}", fix)


def tiktoken_tokens(text: str) -> np.ndarray:
    """(num_tokens,) as of encode_ordinary, also where tiktoken fails."""
    encoding = gpt2()
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half of a surrogate pair, which encode_ordinary replaces
        return tiktoken_tokens(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError as error:
        # All but the last of some whitespace before a word are a word of their own.
        ends = [match.span() for match in LONG_SPACE.finditer(text) if match.end() < len(text)]
        cuts = [0, *(cut for begin, end in ends for cut in (begin, end - 1)), len(text)]
        if len(cuts) == 2:
            where, fix = f"the document that begins {ascii(text[:40])}", "leave it out"
            raise ShardError(where, "text", "such as tiktoken can encode", error, fix) from error
        parts = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
        return np.concatenate([encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])
