"""Text and tokens: bytes, as the quick track reads them, or GPT-2's tokens."""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aurora.config import ROOT
from aurora.errors import Exit, HarnessError
from aurora.text import encoding_of
from aurora.tokens.shards import DOCUMENT_START, GPT2_VOCAB_SIZE, ShardError, is_gpt2_vocab, open_shard, starts_as_shard

BYTES = 256


class Vocabulary:
    """Of a model with so many tokens.

    Attributes:
        is_bytes: Whether every byte is a token.
        size: How many tokens there are; a model may have more, for speed.
        document_start: The token that begins every document.

    Raises:
        HarnessError: CONFIG, tokens that mean no text known here.
    """

    def __init__(self, vocab_size: int):
        self.is_bytes = vocab_size == BYTES
        if not self.is_bytes and not is_gpt2_vocab(vocab_size):
            message = f"model.vocab_size = {vocab_size} is neither {BYTES}, for bytes, nor that of GPT-2's tokens"
            raise HarnessError(Exit.CONFIG, f"{message}, so there is no text for its tokens")
        self.size, self.document_start = (BYTES, 0) if self.is_bytes else (DOCUMENT_START + 1, DOCUMENT_START)

    def encode(self, text: str) -> np.ndarray:
        """(N,) tokens of a text. Raises HarnessError: DATA, GPT-2's files are not to be had."""
        content = text.encode("utf-8", "surrogatepass")
        if self.is_bytes:
            return np.frombuffer(content, np.uint8)
        from data.gpt2 import tokens_of

        try:
            return np.asarray(tokens_of(text))
        except (ShardError, ImportError) as error:
            raise HarnessError(Exit.DATA, without_extra(error)) from error

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; nothing for the start of a document."""
        if token == self.document_start:
            return b""
        if self.is_bytes:
            return bytes([token])
        from data.gpt2 import gpt2

        try:
            return gpt2().decode_single_token_bytes(token)
        except (ShardError, ImportError) as error:
            raise HarnessError(Exit.DATA, without_extra(error)) from error

    def num_bytes(self) -> np.ndarray:
        """(size,) bytes of each token. Of bytes the start of a document is one, too: it stands in the shard as such."""
        if self.is_bytes:
            return np.ones(BYTES, np.int64)
        return gpt2_num_bytes()


@functools.cache
def gpt2_num_bytes() -> np.ndarray:
    vocabulary = Vocabulary(GPT2_VOCAB_SIZE)
    return np.array([len(vocabulary.bytes_of(token)) for token in range(vocabulary.size)])


def without_extra(error: Exception) -> str:
    return f"{error}; pip install -e '.[data]'" if isinstance(error, ImportError) else str(error)


class Document(NamedTuple):
    tokens: np.ndarray  # (N,), without the token that begins it
    num_bytes: int


def read_documents(path: Path, vocabulary: Vocabulary) -> list[Document]:
    """The documents of a text file: of those that data/fineweb.py tokenize takes, or one of any other name.

    Raises:
        HarnessError: DATA, text that cannot be read, or none.
    """
    from data.encode import LocalFiles

    try:
        if path.name.endswith((".txt", ".jsonl", ".jsonl.gz", ".parquet")):
            texts = [document.text for document in LocalFiles([path]).documents({"document": 0})]
        else:
            content = path.read_bytes()
            texts = [content.decode(encoding_of(content[:4]))]
    except (ShardError, ImportError) as error:
        raise HarnessError(Exit.DATA, without_extra(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise HarnessError(Exit.DATA, f"{path} cannot be read: {reason}; name a file of text or a shard") from error
    documents = [
        Document(vocabulary.encode(text), len(text.encode("utf-8", "surrogatepass"))) for text in texts if text
    ]
    if not documents:
        raise HarnessError(Exit.DATA, f"{path} holds no text; name a file of text or a shard")
    return documents


def is_shard(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return starts_as_shard(file.read(4))
    except OSError:
        return False


def read_shard(path: Path, num_tokens: int | None, vocabulary: Vocabulary) -> np.ndarray:
    """The first tokens of a shard, (num_tokens + 1,), or all of them.

    Raises:
        HarnessError: DATA, no such shard, fewer tokens, or tokens that are not of this vocabulary.
    """
    try:
        tokens = open_shard(path)
    except ShardError as error:
        raise HarnessError(Exit.DATA, str(error)) from error
    if len(tokens) < (num_tokens or 1) + 1:
        message = f"{path} has {len(tokens):,} tokens, wanted are {(num_tokens or 1) + 1:,}"
        raise HarnessError(Exit.DATA, f"{message}; lower --tokens")
    tokens = np.ascontiguousarray(tokens[: num_tokens + 1] if num_tokens else tokens)
    if int(tokens.max()) >= vocabulary.size:
        message = f"{path} holds token {int(tokens.max())}, the model knows those below {vocabulary.size}"
        raise HarnessError(Exit.DATA, f"{message}; name a shard of its own kind")
    return tokens


def name_of(path: Path) -> str:
    """A path without the folders of this machine."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
