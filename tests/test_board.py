"""Public results beside ours: reference.toml, the check of its claims against logs in a clone, and its tables."""

import subprocess

import pytest

from scripts import logs
from scripts.analysis import board
from tests.conftest import ROOT

TRACK = """# kept
[[track]]
name = "tiny"
target = 3.28
batch_tokens = 512
vocab_size = 64
repository = "https://example.com/public"
commit = "{commit}"
folder = "results"
text = "Text."

[[track.result]]
row = 1
rule = "sixteen"
optimizer = "muon"
steps = 250
mean = 3.2780
n = 16
logs = ["a/*"]

[[track.result]]
row = 2
rule = "two | of | them"
steps = 250
mean = 3.2700
n = 2
logs = ["b.txt"]

[[track.result]]
row = 3
rule = "lost"
steps = 250
mean = 3.2700
n = 2
logs = ["nowhere/*"]

[[track.result]]
pull = 4
state = "open"
rule = "open"
steps = 240
unchecked = "its logs are elsewhere"
"""


def trial(loss):
    return "".join(
        f"step:{step}/250 val_loss:{value:.5f} train_time:{step}s\n"
        for step, value in ((0, 10.8), (125, loss + 0.01), (250, loss))
    )


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    process = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, check=True, text=True)
    return process.stdout.strip()


@pytest.fixture
def clone(tmp_path):
    """A bare-looking clone: a commit with the logs, no file in the work tree."""
    folder = tmp_path / "clone"
    (folder / "results" / "a").mkdir(parents=True)
    for part in range(2):
        text = "".join(trial(3.2780 + 0.0002 * (seed - 3.5) + 1e-5 * part) for seed in range(8))
        (folder / "results" / "a" / f"{part}.txt").write_text(text)
    (folder / "results" / "b.txt").write_text(trial(3.27) + trial(3.2702))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "logs")
    commit = git(folder, "rev-parse", "HEAD")
    git(folder, "rm", "-qr", ".")
    return folder, commit


def test_checks_are_written_and_stay_right_until_a_claim_changes(tmp_path, clone, capsys):
    folder, commit = clone
    path = tmp_path / "reference.toml"
    path.write_text(TRACK.format(commit=commit))
    arguments = ["--reference", str(path), "--repo", str(folder)]
    assert logs.main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 4, "a line for each result without its check"
    assert logs.main([*arguments, "--write"]) == 0 and logs.main(arguments) == 0
    text = path.read_text()
    assert text.startswith("# kept\n") and text.count("check = ") == 4
    first, second, third, fourth = (result["check"] for result in board.read_reference(path)[0]["result"])
    assert first == {"claim": "follows", "runs": 16, "mean": "3.27800", "first": 250}
    assert (second["claim"], second["runs"], second["mean"]) == ("does not follow", 2, "3.27010")
    assert "2 runs: no test of significance" in second["why"] and "first" not in second
    assert third == {"claim": "not checked", "why": "the repository holds none of its logs"}
    assert fourth == {"claim": "not checked", "why": "its logs are elsewhere"}
    capsys.readouterr()

    path.write_text(text.replace("mean = 3.2780\n", "mean = 3.2770\n"))
    assert logs.main(arguments) == 1
    assert 'row 1: the logs give check = { claim = "does not follow"' in capsys.readouterr().err


def test_tables_of_public_results(tmp_path, clone):
    folder, commit = clone
    path = tmp_path / "reference.toml"
    path.write_text(TRACK.format(commit=commit))
    board.check_reference(path, folder, write=True)
    (track,) = board.read_reference(path)
    assert [row[0] for row in board.short_rows(track)] == ["sixteen", r"two \| of \| them", "lost"], "no pull request"
    assert board.short_rows(track)[0][-1] == "follows, 16 runs, mean 3.27800"
    assert r"two \| of \| them" in board.full_table(track) and "pull 4, open" in board.full_table(track)
    assert board.in_words(track) == "Of 4 claims 1 follow from the logs, 1 do not, 2 could not be checked."


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (('folder = "results"', 'folder = "other"'), "give a clone of the repository with --repo"),
        (('logs = ["a/*"]\n', ""), "no logs and no unchecked: sixteen"),
        (("row = 1\n", ""), "neither row nor pull"),
        (("target = 3.28\n", ""), "a track has no target"),
        (("[[track]]", "[[track"), "is not a list of public results"),
    ],
)
def test_what_cannot_be_read_is_an_error_in_one_line(tmp_path, clone, capsys, edit, error):
    folder, commit = clone
    path = tmp_path / "reference.toml"
    path.write_text(TRACK.format(commit=commit).replace(*edit))
    assert logs.main(["--reference", str(path), "--repo", str(folder)]) == 2
    assert error in (found := capsys.readouterr().err) and found.count("\n") == 1


def test_every_public_result_that_is_committed_states_its_check():
    for track in board.read_reference(ROOT / "results" / "reference.toml"):
        rows = [result["row"] for result in track["result"] if "row" in result]
        assert rows == sorted(set(rows))
        for result in track["result"]:
            assert result["check"]["claim"] in (board.FOLLOWS, board.FOLLOWS_NOT, board.NOT_CHECKED)
            assert (result["check"]["claim"] == board.FOLLOWS) != bool(result["check"].get("why"))
