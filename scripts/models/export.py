"""A run as a folder that Hugging Face's transformers loads: weights, the model's code, tokenizer, model card.

Nothing of transformers is needed to write it. The weights are those of the record and, beside them, buffers that the
model computes when it is made, which transformers would leave empty.
"""

import functools
import json
import math
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from aurora.config import ROOT
from aurora.errors import Exit, HarnessError
from aurora.tokens.shards import ShardError
from aurora.trainer.checkpoint import write_weights
from scripts.analysis.text import cell, markdown_table
from scripts.models.load import Trained
from scripts.models.vocabulary import Vocabulary, without_extra

MODULE, MODEL_TYPE = "modeling_speedrun", "aurora_speedrun"
LICENSES = {  # of the corpora that the project's tracks name, by the folder of their shards
    "data/local": "sources of Python's standard library, under the Python Software Foundation License",
    "data/fineweb10B": "FineWeb, under the Open Data Commons Attribution License (ODC-By) 1.0",
}
WRAPPER = '''

# ---- for transformers ----


class SpeedrunConfig(PretrainedConfig):
    """model: the settings of ModelConfig above."""

    model_type = "{model_type}"

    def __init__(self, model=None, **kwargs):
        self.model = model or {{}}
        self.vocab_size = self.model.get("vocab_size")
        self.max_position_embeddings = self.model.get("seq_len")
        self.num_hidden_layers = self.model.get("num_layers")
        self.hidden_size = self.model.get("model_dim")
        super().__init__(**kwargs)


class SpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    """GPT above, with the interface of transformers. It keeps no keys and values: each token computes all anew."""

    config_class = SpeedrunConfig

    def __init__(self, config):
        super().__init__(config)
        with torch.device("cpu"):  # transformers makes models without memory, which not every model's code can do
            self.model = GPT(ModelConfig(**config.model))
        for module in self.model.modules():
            module._non_persistent_buffers_set.clear()  # they come from the file
        self.post_init()

    def _init_weights(self, module):
        pass  # all weights come from the file

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("this model takes no padding on the left: pad on the right, or give equal lengths")
        logits = self.model.logits(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        longest = self.config.max_position_embeddings
        mask = None if attention_mask is None else attention_mask[:, -longest:]
        return {{"input_ids": input_ids[:, -longest:], "attention_mask": mask}}
'''
IMPORTS = """from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
"""


def check_new(out: Path) -> None:
    """Raise HarnessError: CONFIG, where there is something already."""
    if out.exists() or out.is_symlink():
        raise HarnessError(Exit.CONFIG, f"--to {out} exists, and nothing is overwritten; name a new folder")


def export(trained: Trained, out: Path) -> None:
    """Write the folder, whole or not at all.

    Raises:
        HarnessError: CONFIG, out exists, or the model's tokens are of no known kind; DATA, GPT-2's vocabulary is not to
            be had; DISK.
    """
    check_new(out)
    vocabulary = Vocabulary(trained.config["vocab_size"])
    texts = {
        f"{MODULE}.py": module_text(trained.source),
        "config.json": as_json(config(trained, vocabulary)),
        "generation_config.json": as_json({"use_cache": False} | special_ids(vocabulary)),
        "tokenizer.json": as_json(tokenizer(vocabulary)),
        "tokenizer_config.json": as_json(tokenizer_config(trained)),
        "README.md": checked_card(trained),
        "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8"),
    }
    model = trained.model
    buffers = {f"model.{name}": buffer for name, buffer in model.named_buffers()}
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | buffers
    temporary = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_weights(temporary / "model.safetensors", tensors, {"format": "pt"})
        os.rename(temporary, out)
    except OSError as error:
        message = f"--to {out} cannot be written: {error.strerror}; make room or name another folder"
        raise HarnessError(Exit.DISK, message) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def module_text(source: str) -> str:
    """The model's code, then the classes that transformers wants."""
    head = '"""A model of the optimizer speedrun, as its run\'s record embeds it. The MIT license, see LICENSE."""\n\n'
    needed = [
        line for line in ("import torch", "import torch.nn.functional as F") if f"\n{line}\n" not in f"\n{source}"
    ]
    return head + "".join(f"{line}\n" for line in needed) + IMPORTS + source + WRAPPER.format(model_type=MODEL_TYPE)


def special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    return {"bos_token_id": vocabulary.document_start, "eos_token_id": vocabulary.document_start}


def config(trained: Trained, vocabulary: Vocabulary) -> dict[str, Any]:
    classes = {"AutoConfig": "SpeedrunConfig", "AutoModelForCausalLM": "SpeedrunForCausalLM"}
    return {
        "architectures": ["SpeedrunForCausalLM"],
        "auto_map": {name: f"{MODULE}.{cls}" for name, cls in classes.items()},
        "model_type": MODEL_TYPE,
        "model": trained.config,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "use_cache": False,
    } | special_ids(vocabulary)


@functools.cache  # asked for each byte of 50,000 tokens
def letters() -> list[str]:
    """The character by which byte-level tokenizers write each of the 256 bytes (GPT-2's bytes_to_unicode)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json of the library tokenizers. Raises HarnessError: DATA."""
    start, merges = "<|endoftext|>", []
    if vocabulary.is_bytes:
        vocab = {letter: byte for byte, letter in enumerate(letters())}
        del vocab[letters()[vocabulary.document_start]]  # this byte is the special token, and no text
    else:
        ranks = gpt2_ranks()
        vocab = {as_letters(token): rank for token, rank in ranks.items()}
        merges = [[*map(as_letters, pair)] for pair in gpt2_merges(ranks)]
    vocab[start] = vocabulary.document_start
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary.document_start, "content": start} | special],
        "normalizer": None,
        "pre_tokenizer": bytes_ | {"use_regex": not vocabulary.is_bytes},
        "post_processor": None,
        "decoder": bytes_ | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda entry: entry[1])), "merges": merges,
        },
    }  # fmt: skip


def as_letters(token: bytes) -> str:
    return "".join(letters()[byte] for byte in token)


def gpt2_ranks() -> dict[bytes, int]:
    from data.gpt2 import gpt2

    try:
        encoding = gpt2()
        return {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    except (ShardError, ImportError) as error:
        raise HarnessError(Exit.DATA, without_extra(error)) from error


def gpt2_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens of which each longer one is made, in order: what merging by rank leaves before the last merge."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            merged = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            place = merged.index(min(merged))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def tokenizer_config(trained: Trained) -> dict[str, Any]:
    start = "<|endoftext|>"
    names = dict.fromkeys(("bos_token", "eos_token"), start)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": trained.config["seq_len"],
        "clean_up_tokenization_spaces": False,
    } | names


def checked_card(trained: Trained) -> str:
    try:
        return card(trained)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        message = f"{trained.run.path} lacks what a model card tells ({error!r}); see scripts/verify.py"
        raise HarnessError(Exit.CHECKPOINT, message) from error


def card(trained: Trained) -> str:
    """The model card. All text of the record is made harmless: it may be a stranger's."""
    start, end = trained.run.start, trained.run.end_event
    settings, env = start["config"], start["env"]
    folder = os.path.dirname(str(settings["data"]["train"]))
    source = LICENSES.get(folder, f"{cell(folder)}: whose license applies, the record does not tell")
    batch, steps = settings["train"]["batch_tokens"], settings["train"]["steps"]
    loss = float(end["val_loss"])
    rows = [
        ("run", cell(trained.name)),
        ("data", source),
        ("training tokens", f"{steps:,} steps x {batch:,} = {steps * batch:,}"),
        ("parameters", f"{sum(p.numel() for p in trained.model.parameters()):,}"),
        ("optimizer", f"{cell(start['optimizer'])}{cell(code_of_rule(start), 1000)}, seed {start['seed']}"),
        ("validation loss", f"{loss:.5f} nats a token, perplexity {math.exp(loss):.3f}"),
        ("target", f"{settings['eval']['target']:g}, {reached(end)}"),
        ("training time", f"{end['train_time_s']:.1f} s on {start['world_size']} x {cell(env['device_name'])}"),
        ("software", f"torch {cell(env['torch'])}, Python {cell(env.get('python', '?'))}"),
        ("edits of the model", cell(", ".join(map(str, start.get("model_edits", []))) or "none", 1000)),
        ("weights_sha256", f"`{trained.run.end_event['weights_sha256']}`"),
    ]
    hparams = [(cell(key), cell(value, 1000)) for key, value in sorted(trained.run.setting.items())]
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# {cell(trained.name)}

One run of a speedrun that compares optimizers. It was trained to a validation loss, not to be of use; it knows nothing
but its corpus, and nobody has checked what it says.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)  # runs {MODULE}.py, so read it first
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
tokens = tokenizer("<|endoftext|>", return_tensors="pt").input_ids  # with which every document began
print(tokenizer.decode(model.generate(tokens, max_new_tokens=100, do_sample=True)[0]))
```

{markdown_table(("", "of the run's record"), rows)}

Hyper-parameters and schedule:

{markdown_table(("key", "value"), hparams)}

The license of code and weights is MIT (LICENSE); that of the data is named above. `{MODULE}.py` is the model's code as
the record embeds it. Weights are float32; the model computes in {cell(trained.config.get("activation_dtype"))}.
"""


def code_of_rule(start: dict[str, Any]) -> str:
    """In brackets: whose code it is, where it is not this project's, and the packages with their versions."""
    if not (rule := start.get("rule")):
        return ""
    return f" ({', '.join([rule['class'], *filter(None, rule['packages'].values())])})"


def reached(end: dict[str, Any]) -> str:
    steps = end.get("steps_to_target")
    return "not reached" if steps is None else f"reached at step {steps}"
