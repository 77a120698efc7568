"""What several records are together: copies count once, twins and unlike data are refuted, odd ones break no page."""

import copy
import hashlib
import json
import shutil

import pytest

from aurora.errors import Exit
from aurora.tokens.shards import write_shard
from aurora.trainer.events import RecordError
from aurora.trainer.record import read_folder
from scripts import compare, leaderboard, logs, verify
from scripts.analysis import verdict
from scripts.verification.checks import verify_folder
from scripts.verification.reproduction import reproduce
from tests.conftest import events, markov_tokens, train_here, write_tiny_track
from tests.test_verification import of, write


@pytest.fixture(scope="module")
def three_seeds(tiny_track, tmp_path_factory):
    """A folder with three runs of one setting, and one more of the first seed in a folder below it."""
    out = tmp_path_factory.mktemp("three")
    settings = ["--optimizer", "muon", "--set", "train.steps=6", "--set", "eval.every=3", "--set", "train.log_every=1"]
    for seed in range(3):
        assert train_here(tiny_track, out, *settings, "--seed", str(seed)) == 0
    return out


@pytest.fixture
def folder(three_seeds, tmp_path):
    return shutil.copytree(three_seeds, tmp_path / "runs")


def first_of(folder):
    path = min(folder.glob("*.jsonl"))
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def numbers_of(runs):
    return [len(group.runs) for groups in verdict.group_runs(runs).values() for group in groups]


def test_a_run_counts_once_however_many_files_and_folders_hold_it(folder, capsys, monkeypatch):
    path, record = first_of(folder)
    for copied in (".ipynb_checkpoints/X-checkpoint.jsonl", "X (1).jsonl", "below/X.jsonl"):
        (folder / copied).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / copied)
    write(folder / "while it ran.jsonl", record[:5])
    runs, errors = read_folder(folder, folder / "below", folder)
    assert numbers_of(runs) == [3] and len(errors) == 3, "hidden ones are left out"
    assert all("counts once" in str(error) for error in errors)
    for words in verdict.group_runs(runs).values():
        assert not any("more than once" in flaw for flaw in words[0].flaws())
    monkeypatch.setattr("sys.argv", ["compare.py", "--report", str(folder), str(folder / "below"), "--json"])
    assert compare.main() == 0
    (groups,) = json.loads(capsys.readouterr().out)["tasks"].values()
    assert [len(group["seeds"]) for group in groups["groups"]] == [3]


def with_noise(record):
    """Other val losses on the same training, each still a sum of float32."""
    grain = 2.0**-9 / 512
    for event in (*of(record, "val")[1:], of(record, "end")[0]):
        event["val_loss"] = (round(event["val_loss"] / grain) - 20) * grain


def with_seed(record, seed=7):
    start = record[0]
    start |= {"seed": seed, "run_id": start["run_id"].replace("-s0-", f"-s{seed}-")}
    start["argv"] = [*start["argv"], "--seed", str(seed)]


def other_id(record):
    record[0]["run_id"] = record[0]["run_id"][:-4] + "0000"


TWINS = {
    "noise": ([other_id, with_noise], "has under another val_loss the"),
    "seed": ([with_seed], "has under another seed the"),
    "noise and seed": ([with_seed, with_noise], "has under another seed the"),
    "noise alone": ([with_noise], "has the run_id, but not the contents, of"),
}


@pytest.mark.parametrize("name", TWINS)
def test_noisy_twins_are_refuted_and_are_no_evidence(folder, name):
    path, record = first_of(folder)
    changes, reason = TWINS[name]
    for change in changes:
        change(record)
    write(folder / "zwin.jsonl", record)
    verdicts = {found.path.name: found for found in verify_folder(folder)}
    assert any(reason in found for found in verdicts["zwin.jsonl"].reasons), verdicts["zwin.jsonl"]
    assert verdicts[path.name].reasons == []
    runs, _ = read_folder(folder)
    (groups,) = verdict.group_runs(runs).values()
    words = " ".join(groups[0].flaws())
    assert "equal weights of seeds 0, 7" in words or "seeds more than once: 0" in words or len(groups[0].runs) == 3
    own = [run for run in runs if run.start["seed"] > 0]
    assert reproduce([run for run in runs if run.start["seed"] == 0], own)[0] == "not comparable"


def test_the_same_command_twice_counts_once(folder, tmp_path):
    """Its losses are the same, and its times are not."""
    path, record = first_of(folder)
    other_id(record)
    (folder / "again").mkdir()
    write(folder / "again" / "a.jsonl", record)
    assert numbers_of(read_folder(folder)[0]) == [3]
    notes = [note for found in verify_folder(folder) for note in found.notes]
    assert any("repeats the losses of" in note for note in notes)
    assert not any(found.reasons for found in verify_folder(folder))


def with_another_second_shard(record):
    data = record[0]["data"]
    data["shards"][1]["sha256"] = "0" * 64
    data["fingerprint"] = hashlib.sha256("".join(shard["sha256"] for shard in data["shards"]).encode()).hexdigest()


def test_runs_of_one_task_hash_that_read_other_shards_are_not_compared(trained, tmp_path, capsys):
    """The second shard may repeat the validation tokens: task_hash knows the first alone."""
    record = copy.deepcopy(trained["muon"])
    write(tmp_path / "a.jsonl", record)
    other = copy.deepcopy(trained["aurora"])
    with_another_second_shard(other)
    write(tmp_path / "b.jsonl", other)
    reasons = [found.reasons for found in verify_folder(tmp_path)]
    assert sorted(map(len, reasons)) == [0, 1] and "in place 1 not the train shard, of" in str(reasons)
    assert verify.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 1
    runs, _ = read_folder(tmp_path)
    assert [len(groups) for groups in verdict.group_runs(runs).values()] == [1, 1]
    assert len(verdict.by_task([*runs, *runs[:1]])) == 2
    short = copy.deepcopy(trained["adamw"])
    short[0]["data"]["shards"] = short[0]["data"]["shards"][:1]
    write(tmp_path / "c.jsonl", short)
    tasks = verdict.by_task(read_folder(tmp_path)[0])
    assert sorted(map(len, tasks.values())) == [1, 2], "a run that needs one shard is of the task"


def test_a_shard_under_two_names_is_refused(tmp_path, capsys):
    track = write_tiny_track(tmp_path)
    write_shard(tmp_path / "tiny_train_000002.bin", markov_tokens(20 * 512 + 100, seed=1))
    assert train_here(track, tmp_path / "out", "--optimizer", "muon") == Exit.DATA
    error = capsys.readouterr().err
    assert "tiny_train_000002.bin" in error and "those of tiny_train_000001.bin" in error and "allow_epochs" in error


def test_what_was_parsed_is_what_is_recorded(tiny_track, tmp_path, monkeypatch):
    """A pipe can be read once, and a file may change between two readings."""
    track = tmp_path / "track"
    track.write_text(tiny_track.read_text())
    text, read = track.read_text(), type(track).read_bytes
    reads = []

    def read_and_change(path, *args, **kwargs):
        found = read(path, *args, **kwargs)
        if path == track:
            reads.append(path)
            path.write_text("")
        return found

    monkeypatch.setattr(type(track), "read_bytes", read_and_change)
    assert train_here(track, tmp_path / "out", "--optimizer", "muon", "--set", "train.steps=2") == 0
    assert len(reads) == 1 and events(tmp_path / "out")[0]["sources"]["track.toml"] == text
    (found,) = verify_folder(tmp_path / "out")
    assert (found.word, found.reasons) == ("consistent", [])


def test_an_empty_track_is_told(tmp_path, capsys):
    (tmp_path / "empty.toml").write_text("")
    assert train_here(tmp_path / "empty.toml", tmp_path / "out") == Exit.CONFIG
    assert "empty.toml is empty; a pipe can be read by one process alone" in capsys.readouterr().err


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["page", "picture"])
def test_add_changes_nothing_where_a_record_cannot_be_shown(folder, tmp_path, monkeypatch, capsys, where):
    results = tmp_path / "results"
    shutil.copytree(folder, results / "first")
    assert leaderboard.main(["--results", str(results)]) == 0
    before = files_of(results)
    new = tmp_path / "second"
    new.mkdir()
    path, record = first_of(folder)
    for change in (other_id, lambda r: r[0].update(seed=9)):
        change(record)
    for event in of(record, "val"):
        event["val_loss"] += 1.0
    write(new / "a.jsonl", record)
    monkeypatch.setattr(leaderboard, "verify_folder", lambda folder: [])
    monkeypatch.setattr(leaderboard, "findings", lambda traces: [])
    error = KeyError("odd") if where == "page" else OSError("no picture")
    name = "scripts.analysis.page.tell_apart" if where == "page" else "scripts.plot.plot_groups"

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(name, fail)
    assert leaderboard.main(["add", str(new), "--results", str(results)]) == 2
    assert "error: " in capsys.readouterr().err
    after = {path: content for path, content in files_of(results).items() if "sources" not in path.parts}
    assert after == before


def test_add_refuses_a_twin_of_what_is_there(folder, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(folder, results / "first")
    new = tmp_path / "second"
    new.mkdir()
    _, record = first_of(folder)
    with_seed(record)
    with_noise(record)
    write(new / "a.jsonl", record)
    with pytest.raises(RecordError, match="has under another seed the"):
        leaderboard.add(new, results)


def test_a_gate_is_of_its_own_metric(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("step:10/10 val_loss:3.0 val_bpb:0.9\n")
    with pytest.raises(SystemExit) as error:
        logs.main([str(tmp_path), "--metric", "val_bpb"])
    assert error.value.code == 2 and "--metric val_bpb needs --target: 3.28 is a val_loss" in capsys.readouterr().err
