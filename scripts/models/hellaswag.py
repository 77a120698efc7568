"""HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): which of four endings goes on as the text did?

In the form of lm-evaluation-harness: the ending of the highest log-likelihood behind the context (acc), or of the
highest per character (acc_norm), and texts without WikiHow's markup.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aurora.errors import Exit, HarnessError
from scripts.analysis.evaluation import Evaluation
from scripts.models.likelihood import score
from scripts.models.load import Trained
from scripts.models.vocabulary import Vocabulary, name_of

HUB, DATASET = "hub", "Rowan/hellaswag"
FIX = "each line is an item with ctx_a, ctx_b, activity_label, endings and label, as in hellaswag_val.jsonl"


class Item(NamedTuple):
    query: str
    choices: list[str]
    gold: int


def plain_text(text: str) -> str:
    """Without the markup that WikiHow's part of the data has."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def as_item(row: dict[str, Any]) -> Item:
    query = row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()
    item = Item(plain_text(query), [*map(plain_text, row["endings"])], int(row["label"]))
    if len(item.choices) < 2 or not all(item.choices) or not 0 <= item.gold < len(item.choices):
        raise ValueError("it has no ending with the number of its label, or an empty one")
    return item


def rows_of(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where and what, of each item of a .jsonl file, or of the hub's validation split."""
    if source == HUB:
        try:
            import datasets

            rows = datasets.load_dataset(DATASET, split="validation")
        except Exception as error:  # of datasets, pyarrow or the network
            message = f"{DATASET} is not to be had: {' '.join(str(error).split())[:200]}"
            raise HarnessError(Exit.DATA, f"{message}; pip install -e '.[data]', or name a .jsonl file") from error
        yield from ((f"{DATASET}, item {number}", row) for number, row in enumerate(rows))
        return
    try:
        with open(source, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{source}, line {number}", json.loads(line)
    except OSError as error:
        raise HarnessError(Exit.DATA, f"{source} cannot be read: {error.strerror}; {FIX}") from error
    except (ValueError, RecursionError) as error:
        raise HarnessError(Exit.DATA, f"{source} is no JSON, a line an object: {str(error)[:100]}; {FIX}") from error


def read_items(source: str, limit: int | None = None) -> list[Item]:
    """The first items. source: a .jsonl file, or "hub". Raises HarnessError: DATA."""
    items: list[Item] = []
    for where, row in rows_of(source):
        if len(items) == limit:
            break
        try:
            items.append(as_item(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HarnessError(Exit.DATA, f"{where} is no item of HellaSwag ({error!r}); {FIX}") from error
    if not items:
        raise HarnessError(Exit.DATA, f"{source} holds no item; {FIX}")
    return items


def encode_pair(vocabulary: Vocabulary, context: str, ending: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the context, and those that the ending adds. Spaces at the context's end belong to what follows."""
    stripped = context.rstrip()
    whole, own = vocabulary.encode(context + ending), vocabulary.encode(stripped)
    return whole[: len(own)], whole[len(own) :]


def evaluate_hellaswag(trained: Trained, source: str, limit: int | None = None) -> list[Evaluation]:
    """acc and acc_norm over the items. Raises HarnessError: CONFIG, DATA."""
    vocabulary, items = Vocabulary(trained.config["vocab_size"]), read_items(source, limit)
    pairs = [encode_pair(vocabulary, item.query, f" {choice}") for item in items for choice in item.choices]
    totals = iter([found.logprobs.sum() for found in score(trained, pairs)])
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for item in items:
        logprobs = np.array([next(totals) for _ in item.choices])
        right["acc"].append(int(np.argmax(logprobs)) == item.gold)
        lengths = np.array([len(choice) for choice in item.choices])
        right["acc_norm"].append(int(np.argmax(logprobs / lengths)) == item.gold)
    text = json.dumps(items).encode("utf-8", "surrogatepass")
    name = DATASET if source == HUB else name_of(Path(source))
    return [
        Evaluation("hellaswag", f"{name} {figure}", figure, np.array(values, float), np.ones(len(items)),
                   {"sha256": hashlib.sha256(text).hexdigest()})
        for figure, values in right.items()
    ]  # fmt: skip
