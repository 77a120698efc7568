"""The table of all config keys, configs/README.md, from the docstrings of the code that reads them.

python scripts/config_table.py              write the page
python scripts/config_table.py --check      exit 1 if the page is not what the code gives
"""

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aurora.config import Config, RoleSchedule
from aurora.console import run_script
from aurora.optim import find_rule, hparam_types
from aurora.optim.registry import AuxHparams
from aurora.schedule import MOST_PIECES, Pieces
from scripts.analysis.text import markdown_table

PAGE = ROOT / "configs" / "README.md"
RULES = (
    "adamw", "muon", "normuon", "unormuon", "aurora", "riemannian_aurora",
    "adam", "soap", "muon2", "pmuon", "dynmuon", "psgd", "shampoo",
)  # fmt: skip
TYPES = {
    int: "integer",
    float: "float",
    str: "string",
    bool: "boolean",
    int | str: 'integer or "auto"',
    tuple[float, float]: "two floats",
    float | None: "float",
    int | None: "integer",
    Pieces | None: "list of pieces",
    RoleSchedule | None: "table",
}
INTRODUCTION = """<!-- Written by scripts/config_table.py from the code's docstrings; edit those. -->

# The keys of a track

A track is one TOML file: the tables below, and one `[optimizer.NAME]` table for each optimizer. A key without a default
must be there. An unknown key or a wrong type is an error that names the right one. `--set TABLE.KEY=VALUE` overrides a
key: `--set train.steps=100`, `--set optimizer.muon.lr=0.03`. This page comes from the docstrings of
[aurora/config.py](../aurora/config.py) and [aurora/optim/](../aurora/optim/README.md).

- [quick.toml](quick.toml): the laptop track, bytes of Python's standard library
- [quick_bf16.toml](quick_bf16.toml): the same in bfloat16, for CPUs with instructions for it
- [gpt2_small.toml](gpt2_small.toml): GPT-2 small on FineWeb, the public optimization benchmark's task
- [gpt2_small_short.toml](gpt2_small_short.toml): the same model for 500 small steps, for comparisons on one GPU
- [gpt2_medium.toml](gpt2_medium.toml): 304M parameters, the size of the public speedrun's second track; target 2.92
- [gpt2_350m.toml](gpt2_350m.toml), [gpt2_1b.toml](gpt2_1b.toml): 348M and 1.08B parameters with SwiGLU, about the sizes
  of which Aurora's authors report
- [trial.toml](trial.toml), [prediction.toml](prediction.toml): the tracks of the [trial](../results/TRIAL.md) of
  Aurora's claim, and of the [comparison](../results/PREDICTION.md) with the public board
- [tuning/](tuning/quick.toml): what `compare.py tune` searches on the track of the same name
"""
PIECE_KEYS = [
    ("`until`", "required", "Where the piece ends: a whole number is a step, a float a share of the planned steps."),
    ("`from`", "what held before", "The value where the piece begins. Steps count from 0."),
    ("`to`", "what held before", "The value where the piece ends, from which the next one goes on."),
    ("`shape`", '`"linear"`', "linear, cosine, sqrt (1 - sqrt) or power."),
    ("`exponent`", "required with power", "Of power: the change that is left is (1 - progress)^exponent."),
]
PIECES = f"""### Pieces

A schedule of lr, weight decay or momentum is a list of 1 to {MOST_PIECES} pieces, each a table:

{markdown_table(["key", "default", "meaning"], PIECE_KEYS)}

"What held before" is the `to` of the piece before. The first piece's is 1, for momentum the value in the optimizer's
table. Behind the last piece its `to` holds. Values of lr and weight_decay are shares of the optimizer's table, in
[0, 1], and lr must get to 1. The formulas: [aurora/schedule.py](../aurora/schedule.py).

```toml
[train]
steps = 3250                 # where the run ends

[schedule]
planned_steps = 3300         # the schedule's length: its last 50 steps are not run
lr = [{{until = 100, from = 0.0}}, {{until = 0.6}}, {{until = 1.0, to = 0.0, shape = "cosine"}}]
weight_decay = [{{until = 1.0, to = 0.1, shape = "power", exponent = 1.2}}]

[schedule.embed]             # a role of its own: embed, head, vector or matrix
lr = [{{until = 0.8}}, {{until = 1.0, to = 0.0, shape = "sqrt"}}]

[optimizer.muon.schedule]    # what one optimizer has instead; AdamW has no momentum to schedule
momentum = [{{until = 300, from = 0.85}}, {{until = 3100}}, {{until = 1.0, to = 0.85}}]
```

On the command line an optimizer's schedule is one value:
`--set 'optimizer.muon.schedule={{lr = [{{until = 1.0, to = 0.0}}]}}'`. A schedule that no parameter group can follow is
an error. `--dry-run` says what is scheduled. The record has it, with the values of each logged step under `scheduled`,
and `verify.py` computes them anew.
"""


@dataclasses.dataclass
class Key:
    name: str
    type: Any
    default: Any  # inspect.Parameter.empty where the key must be there
    text: str

    @property
    def cells(self) -> tuple[str, ...]:
        """Under the table's header. The unit is what stands in brackets at the end of the text."""
        unit = re.search(r" \[([a-z][^\]]*)\]\.$", self.text)
        text = f"{self.text[: unit.start()]}." if unit else self.text
        return f"`{self.name}`", TYPES[self.type], as_toml(self.default), unit[1] if unit else "", text


def as_toml(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def described(cls: type) -> dict[str, str]:
    """The texts under "Args:" or "Attributes:" of a docstring, by name."""
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?)+)", inspect.getdoc(cls) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def keys_of(cls: type) -> list[Key]:
    """The fields of a dataclass of the config."""
    hints, texts = get_type_hints(cls), described(cls)
    return [
        Key(
            field.name,
            hints[field.name],
            inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            texts[field.name],
        )
        for field in dataclasses.fields(cls)
    ]


def keys_of_rule(name: str) -> list[Key]:
    """The arguments of a rule's constructor that its table may have."""
    texts: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    for cls in find_rule(name).__mro__:
        if not cls.__module__.startswith("aurora."):
            break
        texts = described(cls) | texts
        if "__init__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__init__"]).parameters
            defaults = {key: parameter.default for key, parameter in parameters.items()} | defaults
    types = {key: hint for key, hint in hparam_types(name).items() if key not in get_type_hints(AuxHparams)}
    return [Key(key, hint, defaults[key], texts[key]) for key, hint in types.items()]


def table(keys: list[Key]) -> str:
    header = ("key", "type", "default", "unit", "meaning")
    rows = [key.cells for key in keys]
    shown = [i for i, title in enumerate(header) if title != "unit" or any(cells[i] for cells in rows)]
    return markdown_table([header[i] for i in shown], [[cells[i] for i in shown] for cells in rows])


def sections() -> Iterator[str]:
    """The page, section by section."""
    yield INTRODUCTION
    for name, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            summary = inspect.cleandoc(hint.__doc__ or "").partition("\n")[0]
            yield f"## [{name}]\n\n{summary}\n\n{table(keys_of(hint))}\n"
            if name == "schedule":
                yield PIECES
    own = [
        Key("steps", int, None, "Length of this optimizer's run, instead of train.steps [steps]."),
        *(Key(key, str, None, described(Config)[key]) for key in ("rule", "parameters")),
        Key("warmup_steps", int, 0, described(Config)["warmup_steps"]),
        Key("projection_init", float, 0.0, described(Config)["projection_init"]),
        Key("schedule", RoleSchedule | None, None, "What this optimizer has instead of [schedule]'s pieces and plan."),
    ]
    yield (
        "## [optimizer.NAME]\n\nThese keys are in every optimizer's table. The rule updates the weight matrices "
        "of the blocks. AdamW updates the\nother parameters with these settings. Where `rule` is `module:Class`, "
        "they come from `[optimizer.adamw]` unless\nthey are given, lr is the constructor's default unless given, "
        "and all other keys are the constructor's arguments.\n\n"
        f"{table(own + keys_of(AuxHparams))}\n"
    )
    matrix = keys_of_rule("muon")
    yield f"### adamw\n\n{table(keys_of_rule('adamw'))}\n"
    yield (
        "### muon, and all rules below\n\nM is the number of rows of a matrix (fan-out), N that of its columns "
        f"(fan-in).\n\n{table(matrix)}\n"
    )
    for name in RULES[2:]:
        added = [key for key in keys_of_rule(name) if key not in matrix]
        yield f"### {name}\n\nBeside muon's keys, or with another default:\n\n{table(added)}\n"


def page() -> str:
    return "\n".join(sections())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the page is stale")
    args = parser.parse_args(argv)
    if not args.check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is not what the code gives: python scripts/config_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
