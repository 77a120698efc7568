"""GPT-2's tokens: tiktoken's own, also where it fails, and the same from gigatoken where that is installed."""

import random
import sys

import numpy as np
import pytest

from aurora.tokens.shards import ShardError
from data import encode, gpt2

tiktoken = pytest.importorskip("tiktoken")
ALPHABETS = (
    "abcdefgh ",
    "ab\n \t",
    "äöüß éñ",
    "你好世界 ",
    "01234,. ",
    "'sSlLvVrReE ",
    "\u0301o\u200d\U0001f600 ",
    "\x00\x1b\xa0",
)


@pytest.fixture
def either(monkeypatch):
    """Lets a test choose the library."""
    cached = gpt2.gigatoken_gpt2

    def choose(name):
        cached.cache_clear()
        if name == "tiktoken":
            monkeypatch.setitem(sys.modules, "gigatoken", None)
        else:
            pytest.importorskip("gigatoken")
            assert gpt2.gigatoken_gpt2() is not None

    yield choose
    cached.cache_clear()


def plain(text):
    return tiktoken.get_encoding("gpt2").encode_ordinary(text)


@pytest.mark.parametrize("library", ["tiktoken", "gigatoken"])
def test_tokens_of_every_class_of_text_are_those_of_encode_ordinary(gpt2_files, either, library):
    either(library)
    assert gpt2.describe_tokenizer().startswith(f"tokens by {library} ")
    draw = random.Random(0)
    texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 300))) for alphabet in ALPHABETS for _ in range(40)]
    texts += ["".join(draw.choices("".join(ALPHABETS), k=200)) for _ in range(40)]
    for text in (*gpt2.SAMPLES, *texts, "", "half \ud83d a pair"):
        assert gpt2.tokens_of(text).tolist() == plain(text), ascii(text)


@pytest.mark.parametrize("library", ["tiktoken", "gigatoken"])
def test_white_space_too_long_for_tiktoken_becomes_the_same_tokens(gpt2_files, either, library):
    either(library)
    for before, after in (("a", "b"), ("", "!"), ("\ud83d", " b"), ("a\u3000\n", "\n1's"), ("a", "")):
        few, many = (gpt2.tokens_of(before + " " * n + after).tolist() for n in (2000, 400_000))
        assert many == [*few[:1000], *[220] * 398_000, *few[1000:]]


def test_where_tiktoken_fails_a_text_is_cut_where_that_changes_no_token(gpt2_files, monkeypatch):
    encoding = tiktoken.get_encoding("gpt2")
    # A text that it can read, for comparison.
    text = "a" + " " * 1500 + "b" + "\n" * 1500 + "c" + "\u3000" * 1200

    class Failing:
        def encode_to_numpy(self, part, **options):
            if part == text:
                raise ValueError("stack")
            return encoding.encode_to_numpy(part, **options)

    monkeypatch.setattr(gpt2, "gpt2", Failing)
    assert gpt2.tiktoken_tokens(text).tolist() == encoding.encode_ordinary(text)


def test_without_gpt2s_files_the_error_says_how_to_get_them(monkeypatch):
    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ShardError, match="TIKTOKEN_CACHE_DIR, found no network"):
        gpt2.gpt2()


def test_a_library_that_differs_is_not_used(gpt2_files, either, monkeypatch):
    either("gigatoken")
    monkeypatch.setattr(gpt2, "tiktoken_tokens", lambda text: np.arange(3))
    gpt2.gigatoken_gpt2.cache_clear()
    assert gpt2.gigatoken_gpt2() is None and gpt2.describe_tokenizer().startswith("tokens by tiktoken")


def test_a_library_that_differs_on_a_document_stops_before_its_tokens_are_written(gpt2_files, either, monkeypatch):
    either("gigatoken")
    other = type("Other", (), {"encode": lambda self, text: np.arange(3)})()
    monkeypatch.setattr(gpt2, "gigatoken_gpt2", lambda: other)
    with pytest.raises(ShardError, match="gigatoken: tokens: expected those of tiktoken.*pip uninstall gigatoken"):
        encode.encode([encode.Piece("some text", True)])
