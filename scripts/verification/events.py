"""A record's events, and whether they have the fields that the checks compute with."""

import json
from dataclasses import dataclass
from typing import Any

from aurora.schedule import PEAKS, SHORT_FORM
from aurora.trainer.events import FIELD_TYPES, NUMBER, is_sane, without_undone

# Nats between val losses of one step on two stacks, such as other ranks or threads, which add in another order:
# differences grow with steps, and a resume or replay repeats few.
OTHER_STACK_TOLERANCE = 2e-2


@dataclass
class Events:
    """A record's first event, all others in the order of the file, and those that no resume has undone."""

    start: dict[str, Any]
    rest: list[dict[str, Any]]

    def __post_init__(self) -> None:
        self.kept = without_undone(self.rest)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.kept if event["event"] == kind]

    @property
    def lost_steps(self) -> int:
        """0, or to which step a resume followed that found the record emptied or gone, and began it anew."""
        first = self.rest[0] if self.rest else {}
        return first["step"] if first.get("event") == "resume" else 0

    @property
    def config(self) -> dict[str, Any]:
        return self.start["config"]

    @property
    def is_edited(self) -> bool:
        """Whether the run's model was another than the config alone describes."""
        return bool(self.start.get("model_edits"))


LEVERAGE_KEYS = "low_leverage", "starved_momentum"  # of rules with momentum; the second in older records


def stack_of(segment: dict[str, Any]) -> str:
    """What the bits of a loss depend on, of a run or resume event."""
    parts = {key: segment.get(key) for key in ("world_size", "micro_batch", "attention", "compiled", "forward")}
    parts["kernels"] = segment.get("kernels", "torch")  # which the first records do not have
    return json.dumps([parts, *(segment["env"].get(key) for key in ("torch", "torch_threads", "cpu"))])


def missing_fields(events: list[dict[str, Any]]) -> list[str]:
    # Other versions, rules without momentum and edited models have no such fields.
    optional = {"tokens", "segments", "untimed", "wall_s", "dead", "silent", "starved", *LEVERAGE_KEYS}
    lacking = {
        f"{event['event']} event lacks {key}": None
        for event in events
        for key in FIELD_TYPES.get(str(event["event"]), {})
        if key not in event and key not in optional
    }
    return list(lacking)


# What the checks below compute with. A list in place of a number would be repeated, not multiplied.
NUMBERS = {
    "config.train": ("steps", "batch_tokens"),
    "config.model": ("vocab_size", "num_layers", "model_dim", "mlp_expansion", "seq_len"),
    "config.eval": ("tokens", "every", "late_every", "late_frac", "target"),
    "config": ("warmup_steps",),
    "params_by_role": ("matrix", "head"),
    "hparams": ("lr",),
    "env": ("cpu_count",),
}


def wrong_numbers(start: dict[str, Any]) -> list[str]:
    tables = {}
    for name in NUMBERS:
        table: Any = start
        for key in name.split("."):
            table = table.get(key) if isinstance(table, dict) else None
        tables[name] = table if isinstance(table, dict) else {}
    groups = start.get("param_groups")
    groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else [{}]
    values = {f"{name}.{key}": tables[name].get(key) for name, keys in NUMBERS.items() for key in keys}
    # What only some schedules have.
    schedule = start["config"].get("schedule") if isinstance(start.get("config"), dict) else None
    schedule = schedule if isinstance(schedule, dict) else dict.fromkeys(SHORT_FORM)
    values |= {f"config.schedule.{key}": schedule[key] for key in (*SHORT_FORM, "planned_steps") if key in schedule}
    values |= {
        f"param_groups[{i}].{peak}": group.get(peak)
        for i, group in enumerate(groups)
        for peak in PEAKS.values()
        if peak in group or peak == "peak_lr"
    }
    return [
        f"{name} is no number: {str(value)[:40]}"
        for name, value in values.items()
        if not isinstance(value, NUMBER) or isinstance(value, bool) or not is_sane(value)
    ]
