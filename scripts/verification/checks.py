"""Checks that a record is consistent with itself. They execute nothing of it; scripts/verify.py --replay runs its code.

| check | catches | cannot catch |
|---|---|---|
| fields: types, bounds, names that the code writes | impossible, torn or added fields | a file rewritten as a whole |
| hashes, run_id, sources whole | changed sources, task, seed, optimizer, date | hashes computed anew after the change |
| config, counts, shards, from track, argv and seed | a swapped config, rule, warm-up | all changed alike |
| parameter groups against hyper-parameters and constructors | settings that were not the run's | all changed alike |
| an optimizer of others: its name, class, versions and embedded source fit together | another's name | its code |
| edits of the model against the embedded train_gpt.py | hidden edits | patches in memory |
| train events at every step where the trainer writes one | what those checks need, left out | - |
| lr, decay and momentum of each train event against the schedule | steps, values or schedule edited | values not used |
| validations against the declared steps | early stop, extra or dropped ones | those that were never logged |
| a resume before all else: the record was emptied, and is incomplete | a beginning that is left out | what it held |
| validations that a resume undid | bad ones undone | by up to 0.02 nats on another stack, which is noted |
| neurons: counts, shares and ranks within their bounds, at declared steps | impossible numbers | invented ones |
| times rise, step times add up, all differ; timed + untimed = wall | edited times, times typed in | a patched clock |
| step time against 6 N FLOP a token | impossible speed | a merely flattering one |
| a val loss is a sum of float32 over its tokens | losses typed in or rounded | a sum that was forged on purpose |
| loss of an untrained model, train against val loss | another vocabulary, leaked validation | slight leaks |
| end event against the validations; its speed against steps, seconds, FLOP | edited results | another GPU named |
| weights beside the record, against its weights_sha256 | cut, edited or swapped weights | both changed alike |
| records together: run_id, losses, weights, training losses | copies, twins under another seed or val loss | - |
| records together: shards of one task | another second shard | a task of which all runs read it |
| noted only: a folder's seeds | dropped seeds | seeds run elsewhere and left out at either end |
| noted only: sources against the commit they name | changes that the record keeps quiet about | another commit named |

Fields that no other number depends on cannot be checked: names, versions and variables of the machine, memory, waiting
times, the weights' hash where no weights lie beside it; tests/test_tampering.py has the list, with the reason for each.

A consistent record can still be invented. Only a replay, and then runs with seeds of your own, show that it is not.
A replay does not judge the embedded code, which is compared with its commit alone: cheating code replays, too.
"""

from dataclasses import dataclass, field
from pathlib import Path

from aurora.trainer.events import RecordError, read_events
from aurora.trainer.identity import json_hash
from aurora.trainer.record import record_paths, run_of, seed_gaps
from aurora.trainer.weights import WeightsError, check_weights, weights_of
from scripts.verification.events import Events, missing_fields, wrong_numbers
from scripts.verification.expected import check_config, notes_on_edits
from scripts.verification.external import check_rule, notes_on_rule
from scripts.verification.groups import check_groups
from scripts.verification.identity import check_identity, notes_on_commit, notes_on_machine
from scripts.verification.neurons import check_neurons
from scripts.verification.numbers import (
    check_end,
    check_logs,
    check_losses,
    check_order,
    check_scheduled,
    check_times,
    check_validations,
    notes_on_losses,
    notes_on_order,
)
from scripts.verification.schema import check_fields, notes_on_fields
from scripts.verification.together import Trace, findings, trace_of

CHECKS = (
    # The others compute with the config, and stop where it is not the run's.
    *(check_fields, check_identity, check_groups, check_rule, check_config, check_order, check_validations, check_logs),
    *(check_times, check_scheduled, check_losses, check_neurons, check_end),
)
NOTES = (
    notes_on_rule,
    notes_on_edits,
    notes_on_fields,
    notes_on_order,
    notes_on_losses,
    notes_on_machine,
    notes_on_commit,
)


@dataclass
class Verification:
    """word: consistent, incomplete, or refuted with reasons; gaps or replayed if that is known; see scripts/verify.py.

    is_whole: whether the record tells how the run began and ended.
    """

    path: Path
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    word_if_good: str = "consistent"
    is_whole: bool = True

    @property
    def word(self) -> str:
        good = self.word_if_good
        return "refuted" if self.reasons else good if self.is_whole or good.startswith("replayed") else "incomplete"


def verify_run(path: Path) -> Verification:
    """Every check that one record allows. Never raises for what a record holds."""
    return verify_events(path)[0]


def verify_events(path: Path) -> tuple[Verification, Events | None]:
    verdict = Verification(path)
    try:
        events = [event for _, event in read_events(path)]
        if not events:
            verdict.is_whole = False
            verdict.notes.append("incomplete: no event, as a crash leaves it")
            return verdict, None
        found = Events(events[0], events[1:])
        verdict.reasons += missing_fields(events) or wrong_numbers(found.start)
    except RecordError as error:
        verdict.reasons.append(str(error))
        return verdict, None
    if verdict.reasons:
        return verdict, None
    if not path.read_bytes().endswith(b"\n"):
        verdict.notes.append("the last line is torn, as a crash leaves it")
    for check in CHECKS:
        before = len(verdict.reasons)
        try:
            verdict.reasons += check(found)
        except Exception as error:  # a field of a type that no run writes may raise anything; which one, the error says
            verdict.reasons.append(f"{check.__name__}: a field is missing or wrong ({type(error).__name__}: {error})")
        if check is check_config and len(verdict.reasons) > before:
            break
    if found.is_edited:
        verdict.notes.append("model edited: not checked are parameter counts, the untrained loss and neurons' numbers")
    if found.lost_steps:
        verdict.is_whole = False
        verdict.notes.append(f"incomplete: begins at step {found.lost_steps}, with a resume; what was before is lost")
    if not found.of("end"):
        verdict.is_whole = False
        verdict.notes.append("incomplete: no end event")
    verdict.reasons += wrong_weights(path, found)
    if verdict.reasons:
        return verdict, found
    verdict.notes += [note for notes in NOTES for note in notes(found)]
    return verdict, found


def wrong_weights(path: Path, run: Events) -> list[str]:
    """What is wrong with the weights beside a finished run's record, if there are any."""
    ends = [event for event in run.of("end") if event["status"] == "done"]
    if not ends or not weights_of(path).exists():
        return []
    try:
        check_weights(path, str(ends[-1].get("weights_sha256")))
    except WeightsError as error:
        return [str(error)]
    return []


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def verify_folder(*places: Path) -> list[Verification]:
    """A verdict for each record at these paths or below these folders, with what only all together show."""
    verdicts: dict[Path, Verification] = {}
    groups: dict[tuple[str, ...], list[tuple[int, Verification]]] = {}
    traces: list[Trace] = []
    paths = [path for place in places for path in (record_paths(place) if is_folder(place) else [place])]
    for path in {path.absolute(): path for path in paths}.values():
        verdicts[path], found = verify_events(path)
        try:
            run = run_of(path, [found.start, *found.rest]) if found else None
            if run is None:
                continue
            traces.append(trace_of(run))
        except (RecordError, KeyError, TypeError, ValueError):  # for which it is refuted already
            continue
        is_tuning = path.parent.name.endswith("_tuning")  # with seeds of its own
        setting = json_hash([run.setting, is_tuning])
        key = run.start["task_hash"], run.start["optimizer"], setting, run.start["code_hash"]
        groups.setdefault(key, []).append((run.start["seed"], verdicts[path]))
    for finding in findings(traces):
        verdict = verdicts[finding.later.path]
        found_in = verdict.reasons if finding.is_refuted else verdict.notes
        found_in.append(f"{finding.text} {finding.earlier.path.name}")
    for members in groups.values():
        seeds = sorted(seed for seed, _ in members)
        if missing := seed_gaps(seeds):
            for _, verdict in members:
                verdict.word_if_good = "gaps"
                verdict.notes.append(f"its group of seeds {seeds} lacks {missing}: run, and left out?")
    return list(verdicts.values())
