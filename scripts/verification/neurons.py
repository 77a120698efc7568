"""Check of the neurons' telemetry: at the declared steps, and numbers within their bounds."""

import math
from collections.abc import Iterator
from typing import Any

from aurora.optim.diagnostics import LEVERAGE_EDGES, STARVED_FRAC
from scripts.verification.events import LEVERAGE_KEYS, Events
from scripts.verification.numbers import declared_validations


def check_neurons(run: Events) -> Iterator[str]:
    model, validations, steps = run.config["model"], run.config["eval"], {event["step"] for event in run.of("val")}
    last, events = run.config["train"]["steps"], {event["step"]: event for event in run.of("neurons")}
    planned = {
        step
        for step in declared_validations(run.config)
        if step > 0 and (step % validations["every"] == 0 or step == last)
    }
    # A crash may have come between the two lines of the last validation.
    certain = planned & (steps if run.of("end") else steps - {max(steps, default=0)})
    if not validations.get("telemetry", False):
        planned = certain = set()
    if not certain <= set(events) <= planned:
        yield f"neurons are not those of the declared steps: {sorted(certain ^ set(events))[:5]}"
    if run.is_edited:  # its MLPs may be of any form
        return
    width, num_layers = model["mlp_expansion"] * model["model_dim"], model["num_layers"]
    if any((event["width"], len(event["layers"])) != (width, num_layers) for event in events.values()):
        yield "neurons are not of the width and layers in the config"
        return
    layers = range(num_layers if events else 0)
    kinds = ("gate", "up", "down") if model.get("mlp") == "swiglu" else ("up", "down")
    names = [f"blocks.{i}.mlp.{kind}" for i in layers for kind in kinds]
    before: dict[str, list[int]] = {}
    for index, (step, event) in enumerate(events.items()):
        found, tall = event["matrices"], [name for name in names if not name.endswith("down")]
        if sorted(found) != sorted(names):
            yield f"step {step}: neurons are not of the model in the config"
            continue
        leverage = [key for key in LEVERAGE_KEYS if key in event]
        if leverage != [key for key in LEVERAGE_KEYS if found[tall[0]].get(key) is not None] or len(leverage) > 1:
            yield f"step {step}: leverage is of all matrices or of none"
            continue
        # Shares of gated MLPs stand in older records alone.
        told = [key for key in ("dead", "silent") if key in event or "gate" not in kinds]
        sums = {key: sum(layer[key] for layer in event["layers"]) / (width * len(layers)) for key in told}
        shares = ["starved", *leverage]
        for key in shares:
            sums[key] = sum(found[name][key] for name in tall) / (width * len(tall))
        is_possible = [0 < event["tokens"] <= validations["tokens"], *(0 <= event[key] <= 1 for key in sums)]
        is_possible += [math.isclose(event[key], value, abs_tol=1e-9) for key, value in sums.items()]
        for layer in event["layers"]:
            is_possible += [0 <= layer["silent"] <= width, 0 <= (layer["still_dead"] or 0) <= layer["dead"] <= width]
        for matrix in found.values():
            low, high = matrix["update_quantiles"][0], matrix["update_quantiles"][-1]
            rank = matrix["effective_rank"]
            is_possible += [0 <= matrix[key] <= width for key in shares]
            is_possible += [
                0 <= matrix["update_cv"] <= math.sqrt(width),
                0 <= rank <= 1.001 * min(width, model["model_dim"]),
            ]
            is_possible += [low == high == 0 or 0 <= low <= 1.001 and 0.999 <= high <= width]
            is_possible.append(matrix["update_quantiles"] == sorted(matrix["update_quantiles"]))
        if "low_leverage" in event:
            is_possible += [
                is_possible_leverage(matrix, width, before.get(name, [width] * index)) for name, matrix in found.items()
            ]
            before = {name: matrix["low_streaks"] for name, matrix in found.items()}
        if not all(is_possible):
            yield f"step {step}: numbers on neurons cannot be"


def is_possible_leverage(matrix: dict[str, Any], width: int, before: list[int]) -> bool:
    """Whether all rows are in the histogram, those below a tenth of an even one are counted, and no row was low for
    longer than at the look before, whose low_streaks are given."""
    histogram, low, streaks = (matrix[key] for key in ("leverage_histogram", "low_leverage", "low_streaks"))
    num_low_bins = LEVERAGE_EDGES.index(STARVED_FRAC) + 1
    return (
        (len(histogram), sum(histogram)) == (len(LEVERAGE_EDGES) + 1, width)
        and low == sum(histogram[:num_low_bins]) == (streaks[0] if streaks else 0)
        and len(streaks) <= len(before) + 1
        and all(now <= then for now, then in zip(streaks[1:], before, strict=False))
        and streaks == sorted(streaks, reverse=True)
    )
