"""What the numbers and words of a config may be."""

from typing import TYPE_CHECKING, Any

from aurora.schedule import MOST_STEPS, SHORT_FORM
from aurora.typed import check_bound

if TYPE_CHECKING:
    from aurora.config import Config

DTYPES = ("float32", "bfloat16")
MLPS = ("relu2", "swiglu")
SHARDS = ("owners", "fsdp2")
HEAD_DTYPES = ("activation", "float8")

# Of whole numbers, the largest that a run can have, so that checks before it end in a second.
LARGEST = {
    **{"num_layers": 256, "model_dim": 65536, "num_heads": 65536, "seq_len": 2**20, "mlp_expansion": 128},
    "steps": MOST_STEPS,
    **dict.fromkeys(("balance_steps", "ascent_steps", "cg_steps"), 10_000),  # each in every step of the run
}
LARGEST_WHOLE = 2**31 - 1  # of the others; no shard holds more tokens
LARGEST_HPARAM = 1e12  # of an optimizer's other numbers: their products stay within float32


def check_bounds(config: "Config") -> None:
    """Raise HarnessError for a value out of range."""
    for name in ("model", "train", "eval"):
        for key, value in vars(getattr(config, name)).items():
            if type(value) is int:  # no bool
                lowest, highest = 0 if key == "checkpoint_every" else 1, LARGEST.get(key, LARGEST_WHOLE)
                wanted = f"at least {lowest}" if value < lowest else f"at most {highest}"
                check_bound(f"{name}.{key}", value, lowest <= value <= highest, wanted)

    model, train, evaluation, schedule = config.model, config.train, config.eval, config.schedule
    head_dim = model.model_dim / model.num_heads
    whole_sequences, table = f"a multiple of model.seq_len = {model.seq_len}", f"optimizer.{config.optimizer}"
    short = {key: getattr(schedule, key) for key in SHORT_FORM}
    planned = train.steps if schedule.planned_steps is None else schedule.planned_steps
    wanted_plan = f"at least train.steps = {train.steps}, where the run ends, and at most {MOST_STEPS}"
    bounds = [
        ("model.vocab_size", model.vocab_size, model.vocab_size <= 65536, "at most 65536: tokens are uint16"),
        ("model.model_dim / num_heads", head_dim, head_dim % 4 == 0, "a multiple of 4: half a head turns, in pairs"),
        ("model.rope_base", model.rope_base, 1 < model.rope_base <= 1e12, "above 1, and at most 1e12"),
        ("model.attention_scale", model.attention_scale, 0 < model.attention_scale <= 1e6, "in (0, 1e6]"),
        ("model.logit_softcap", model.logit_softcap, 0 < model.logit_softcap <= 64, "in (0, 64]"),
        ("model.activation_dtype", model.activation_dtype, model.activation_dtype in DTYPES, " or ".join(DTYPES)),
        ("model.mlp", model.mlp, model.mlp in MLPS, " or ".join(MLPS)),
        ("model.head_dtype", model.head_dtype, model.head_dtype in HEAD_DTYPES, " or ".join(HEAD_DTYPES)),
        ("train.compile", train.compile, train.compile in ("auto", "on", "off"), "auto, on or off"),
        ("train.shard", train.shard, train.shard in SHARDS, " or ".join(SHARDS)),
        ("train.batch_tokens", train.batch_tokens, train.batch_tokens % model.seq_len == 0, whole_sequences),
        ("eval.tokens", evaluation.tokens, evaluation.tokens % model.seq_len == 0, whole_sequences),
        ("eval.target", evaluation.target, evaluation.target > 0, "a positive loss"),
        ("eval.late_frac", evaluation.late_frac, 0 <= evaluation.late_frac <= 1, "in [0, 1]"),
        *((f"schedule.{key}", value, value is None or 0 <= value <= 1, "in [0, 1]") for key, value in short.items()),
        ("schedule.planned_steps", planned, train.steps <= planned <= MOST_STEPS, wanted_plan),
        (f"{table}.warmup_steps", config.warmup_steps, config.warmup_steps >= 0, "at least 0"),
        (
            f"{table}.warmup_steps",
            config.warmup_steps,
            config.warmup_steps <= LARGEST_WHOLE,
            f"at most {LARGEST_WHOLE}",
        ),
        (f"{table}.projection_init", config.projection_init, 0 <= config.projection_init <= 100, "in [0, 100]"),
    ]
    if model.head_dtype == "float8":
        sixteens = 'a multiple of 16 for model.head_dtype = "float8" (or set that to "activation")'
        bounds += [
            ("model.vocab_size", model.vocab_size, model.vocab_size % 16 == 0, sixteens),
            ("model.model_dim", model.model_dim, model.model_dim % 16 == 0, sixteens),
        ]
    for bound in bounds:
        check_bound(*bound)


def check_hparams(name: str, hparams: dict[str, Any]) -> None:
    """Raise HarnessError for numbers that no rule can mean; a rule's constructor knows its own bounds."""
    for key, value in hparams.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                largest = LARGEST.get(key, LARGEST_WHOLE) if isinstance(number, int) else LARGEST_HPARAM
                label, wanted = f"optimizer.{name}.{key}", f"within -{largest:g} and {largest:g}"
                check_bound(label, value, abs(number) <= largest, wanted)
