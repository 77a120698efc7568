"""Logs of other people: formats, trials, claims, and what hostile or broken files do."""

import json
import math
import os
import random
import sys

import pytest

from scripts import logs
from scripts.analysis import claims, log_comparison
from scripts.analysis.foreign import LogError, read_log
from scripts.analysis.text import cell, plain
from scripts.verification.export import export_record, is_inside
from tests.conftest import losses, start_process, train_here


def log(folder, text, name="log.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def trial_text(losses=(10.8, 4.6, 3.3), unit="s", steps=(0, 125, 250), total=250):
    scale = {"s": 1, "ms": 1000}[unit]
    lines = [
        f"step:{step}/{total} val_loss:{loss:.5f} train_time:{0.15 * step * scale:.3f}{unit} step_avg:150.00ms"
        for step, loss in zip(steps, losses, strict=True)
    ]
    return "\n".join(lines) + "\n"


SOURCE = 'print0(f"step:{step}/{steps} val_loss:{val_loss:.5f} train_time:{t:.3f}s")\n' + "=" * 100 + "\n"


@pytest.mark.parametrize("unit", ["s", "ms"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_modded_nanogpt_in_seconds_and_milliseconds(tmp_path, unit, end):
    text = (SOURCE + trial_text(unit=unit)).replace("\n", end)
    (trial,) = read_log(log(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert trial.status == "complete" and trial.total_steps == 250
    assert [validation.step for validation in trial.validations] == [0, 125, 250]
    assert trial.validations[1].time_s == pytest.approx(18.75) and trial.values("val_loss")[250] == 3.3


def test_several_trials_in_a_file_and_more_metrics(tmp_path):
    text = (
        trial_text() + "noise\n" + trial_text((10.8, 4.5, 3.2)).replace(" train_time", " val_ema_loss:3.1 train_time")
    )
    first, second = read_log(log(tmp_path, text))
    assert (first.number, second.number) == (1, 2)
    assert second.values("val_ema_loss") == {0: 3.1, 125: 3.1, 250: 3.1} and not first.values("val_ema_loss")


def test_trials_that_do_not_begin_at_zero(tmp_path):
    text = trial_text((4.6, 3.3), steps=(125, 250)) * 2
    assert [trial.status for trial in read_log(log(tmp_path, text))] == ["complete"] * 2


def test_torn_diverged_restarted_and_summarised_trials(tmp_path):
    (torn,) = read_log(log(tmp_path, trial_text(total=500)))
    assert torn.status == "torn"
    (diverged,) = read_log(log(tmp_path, trial_text((10.8, 4.6, math.nan))))
    assert diverged.status == "diverged"
    again = trial_text((10.8, 4.6, 4.0), steps=(0, 100, 200)) + trial_text((3.9, 3.2), steps=(150, 250))
    (restarted,) = read_log(log(tmp_path, again))
    assert restarted.is_rewound and restarted.values("val_loss") == {0: 10.8, 100: 4.6, 150: 3.9, 250: 3.2}
    (whole,) = read_log(log(tmp_path, trial_text() + trial_text((4.6, 3.3), steps=(125, 250))))
    assert not whole.is_rewound and len(whole.validations) == 3


def test_parameter_golf_llm_c_and_nanogpt(tmp_path):
    golf = (
        "0/20000 val_loss: 9.0076 val_bpb: 4.1159\n"
        "1776142723.115 8000/20000 val_loss: 2.9 val_bpb: 1.3 train_time: 2.0m tok/s: 5\n"
        "stopping_early: wallclock_cap train_time: 600036ms step: 8000/20000\n"
        "final_int8_zlib_roundtrip val_loss:1.9918 val_bpb:1.1797 eval_time:10291ms\n"
    )
    (trial,) = read_log(log(tmp_path, golf))
    assert trial.status == "complete" and trial.validations[-1].time_s == 120.0
    assert trial.values("final_int8_zlib_roundtrip val_bpb") == {8000: 1.1797}
    (trial,) = read_log(log(tmp_path, "s:0 tel:11.0\ns:0 trl:11.0 lr:1e-4\ns:250 tel:6.4567\n", "main.log"))
    assert trial.values("val_loss") == {0: 11.0, 250: 6.4567} and trial.status == "open"
    text = "val loss 11.0\nstep    1/500 | loss 10.9\nstep  500/500 | loss 4.0\nval loss 3.9\n"
    (trial,) = read_log(log(tmp_path, text))
    assert trial.values("val_loss") == {0: 11.0, 500: 3.9}
    (trial,) = read_log(log(tmp_path, "step 0: train loss 4.2, val loss 4.3\nstep 250: train loss 2.0, val loss 2.1\n"))
    assert trial.values("val_loss") == {0: 4.3, 250: 2.1}


def test_what_is_no_log_is_named(tmp_path):
    with pytest.raises(LogError, match="notes.txt holds no validation line"):
        read_log(log(tmp_path, SOURCE, "notes.txt"))
    with pytest.raises(LogError, match="gone.txt cannot be read"):
        read_log(tmp_path / "gone.txt")


# ----------------------------------------------------------------------------------------------------------------------
# Claims


def rows(folder, last_losses, total=250):
    for i, loss in enumerate(last_losses):
        log(folder, trial_text((10.8 + i / 1000, 4.6, loss), total=total), f"{i}.txt")
    return folder


GOOD = [3.2781, 3.2779, 3.2777, 3.2783]


def test_a_claim_that_follows(tmp_path):
    finding = claims.check([rows(tmp_path, GOOD)], claims.Claim("row", 250, "3.2780", 4), 3.28)
    assert finding["follows"] and finding["mean"] == pytest.approx(3.278)
    assert finding["gate"] == pytest.approx(0.004) and finding["first_step_that_passes"] == 250
    assert "the claim follows" in claims.as_text(finding)


@pytest.mark.parametrize(
    "last_losses, claim, problem",
    [
        (GOOD, (250, "3.2780", 10), "10 runs are claimed, the logs hold 4"),
        (GOOD, (250, "3.2770", 4), "is 3.27800, not 3.2770"),
        (GOOD, (250, "3.2779", 4), None),  # the last digit
        (GOOD, (250, "4.6000", 4), "that is the mean at step 125"),
        (GOOD, (250, "3.2777", 4), "the lowest 1 of 4 have that mean"),
        (GOOD, (200, "3.2780", 4), "4 of 4 runs have no val_loss at step 200"),
        (GOOD[:1], (250, "3.2781", 1), "1 run: no test of significance is possible; the gate is missed"),
        ([3.2771, 3.2772], (250, "3.27715", 2), "2 runs: no test of significance is possible; the gate is met, taking"),
        ([3.2795, 3.2799, 3.2790], (250, "3.2795", 3), "the gate is missed"),
        ([3.277, 3.276, math.nan], (250, "3.2765", 3), "1 of 3 runs have no val_loss"),
    ],
)
def test_claims_that_do_not_follow_say_why(tmp_path, last_losses, claim, problem):
    finding = claims.check([rows(tmp_path, last_losses)], claims.Claim("row", *claim), 3.28)
    if problem is None:
        assert finding["follows"] and "the last digit" in finding["remarks"][0]
    else:
        assert not finding["follows"] and problem in " ".join(finding["problems"])


def test_a_run_that_is_there_twice_counts_once(tmp_path):
    """As a whole, on another stream, and as its last line alone."""
    rows(tmp_path, GOOD)
    log(tmp_path, (tmp_path / "0.txt").read_text().replace("10.80000", "10.80001") + "\n", "again.txt")
    log(tmp_path, (tmp_path / "1.txt").read_text().splitlines()[-1] + "\n", "final_val_loss.txt")
    log(tmp_path, "noise\n" + (tmp_path / "2.txt").read_text() + "more\n", "stream.stdout")
    finding = claims.check([tmp_path], claims.Claim("row", 250, "3.2780", 7), 3.28)
    assert finding["problems"] == ["7 runs are claimed, the logs hold 4"] and finding["copies"] == 3
    assert "again.txt, trial 1 has the losses of 0.txt, trial 1 and counts as the same run" in finding["remarks"][0]
    assert "and 2 more such" in finding["remarks"][0]
    assert claims.check([tmp_path], claims.Claim("row", 250, "3.2780", 4), 3.28)["follows"]


def test_one_equal_loss_at_another_time_is_chance(tmp_path):
    for name, seconds in (("a", 39), ("b", 40), ("c", 41)):
        log(tmp_path, f"step:250/250 val_loss:3.27810 train_time:{seconds}s step_avg:1ms\n", f"{name}.txt")
    assert claims.check([tmp_path], claims.Claim("row", 250, "3.2781", 3), 3.28)["trials"] == 3


def test_runs_of_another_schedule_are_another_setting(tmp_path):
    rows(tmp_path, GOOD)
    for i in range(3):
        log(tmp_path, trial_text((10.8, 4.6, 3.4 + i / 1000), total=300), f"long{i}.txt")
    finding = claims.check([tmp_path], claims.Claim("row", 250, "3.2780", 4), 3.28)
    assert finding["follows"] and "left out are runs of other schedules: 3 of 300 steps" in finding["remarks"]
    mixed = claims.check([tmp_path], claims.Claim("row", 250, None, None), 3.28)
    assert "the runs have schedules of 250, 300 steps: they are not of one setting" in mixed["problems"]


def test_more_runs_than_claimed_say_which_of_them_fit(tmp_path):
    for name, shift in (("chosen", 0.0), ("other", 0.004)):
        (tmp_path / name).mkdir()
        rows(tmp_path / name, [loss + shift for loss in GOOD])
    finding = claims.check([tmp_path], claims.Claim("row", 250, "3.2780", 4), 3.28)
    assert not finding["follows"] and finding["trials"] == 8
    assert "the 4 in the folder chosen have the mean that is claimed" in finding["problems"][0]


def test_runs_stopped_where_they_meet_the_target_flatter(tmp_path):
    for i, stop in enumerate((225, 250, 275)):
        log(tmp_path, trial_text((10.8 + i, 3.29, 3.279), steps=(0, 200, stop), total=300), f"{i}.txt")
    finding = claims.check([tmp_path], claims.Claim("row", None, None, None), 3.28)
    assert any("own first validation below the target" in problem for problem in finding["problems"])
    folder = tmp_path / "fixed"
    folder.mkdir()
    rows(folder, GOOD)
    assert claims.check([folder], claims.Claim("row", 250, "3.2780", 4), 3.28)["problems"] == []


def test_runs_capped_by_time_are_taken_at_their_ends(tmp_path):
    """parameter-golf: the step differs from run to run, the last metrics belong to each run's end."""
    for i in range(3):
        text = (
            f"0/20000 val_loss: 9.0{i} val_bpb: 4.1159\n{8000 + i}/20000 val_loss: 2.9{i} val_bpb: 1.3\n"
            f"stopping_early: wallclock_cap train_time: 600036ms\nfinal_roundtrip val_loss:1.99 val_bpb:1.17{i}\n"
        )
        log(tmp_path, text, f"{i}.log")
    finding = claims.check([tmp_path], claims.Claim("golf", None, "1.171", 3), 1.18, "final_roundtrip val_bpb")
    assert finding["follows"] and finding["complete"] == 3 and finding["mean"] == pytest.approx(1.171)
    assert "at the end" in claims.as_text(finding)


def test_another_metric_with_the_claimed_mean_is_named_with_its_statistics(tmp_path):
    folder = tmp_path / "ema"
    folder.mkdir()
    for i in range(3):
        text = trial_text((10.8, 4.6, 3.29 + i / 1e4)).replace(" train_time", f" val_ema_loss:3.27{i} train_time")
        log(folder, text, f"{i}.txt")
    finding = claims.check([folder], claims.Claim("row", 250, "3.2710", 3), 3.28)
    assert "not 3.2710; val_ema_loss has it" in finding["problems"][0] and not finding["follows"]
    assert finding["other_metric"]["gate"] == pytest.approx(0.009 * 3**0.5)
    assert "val_ema_loss at step 250: mean 3.27100" in claims.as_text(finding)


def test_a_claim_that_the_gate_alone_supports_says_so(tmp_path):
    spread = rows(tmp_path, [3.2750, 3.2799, 3.2800, 3.2766])
    finding = claims.check([spread], claims.Claim("row", 250, "3.2779", 4), 3.28)
    assert finding["follows"] and "by the gate alone" in claims.as_text(finding)


def test_sets_of_logs_compare_by_loss_within_a_schedule_and_by_arrival_across(tmp_path):
    same, short, long, never = (tmp_path / name for name in ("same", "short", "long", "never"))
    for folder, finals, steps in (
        *((same, GOOD, 250), (short, [loss - 0.01 for loss in GOOD], 250)),
        *((long, GOOD, 400), (never, [3.3, 3.31, 3.29, 3.32], 400)),
    ):
        folder.mkdir()
        for i, loss in enumerate(finals):
            text = trial_text((10.8 + i / 1000, 4.6, loss), steps=(0, steps - 5, steps), total=steps)
            log(folder, text, f"{i}.txt")
    by_loss = log_comparison.compare([short], [same], 250, "val_loss", 3.28)
    assert by_loss["measure"] == "val_loss at step 250" and by_loss["difference"] == pytest.approx(-0.01)
    with pytest.raises(ValueError, match="--steps"):
        log_comparison.compare([short], [same], None, "val_loss", 3.28)
    across = log_comparison.compare([short], [long], None, "val_loss", 3.28)
    assert "steps to a val_loss of 3.28" in across["measure"] and across["difference"] < -100 and across["p"] < 0.01
    censored = log_comparison.compare([short], [never], 250, "val_loss", 3.28)
    assert censored["share"] == 1 and censored["arrived"] == [4, 0] and censored["p"] == pytest.approx(2 / 70)
    assert "0 of 4 arrived, the first is earlier in 100% of pairs" in log_comparison.as_text(censored)
    with pytest.raises(ValueError, match="of 2 schedules"):
        log_comparison.compare([tmp_path], [long], 250, "val_loss", 3.28)
    for i, loss in enumerate(GOOD):
        log(same, trial_text((10.8 + i / 1000, 4.6, loss), steps=(0, 125, 250), total=250), f"{i}.txt")
    with pytest.raises(ValueError, match="validations at steps 125 and 250 are too far apart"):
        log_comparison.compare([same], [long], None, "val_loss", 3.28)


def test_pipes_and_endless_logs_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(LogError, match="no regular file"):
        read_log(tmp_path / "pipe.txt")
    with open(log(tmp_path, "", "large.txt"), "wb") as file:
        file.truncate(2**40)
    with pytest.raises(LogError, match="larger than"):
        read_log(tmp_path / "large.txt")
    with pytest.raises(LogError, match="trials"):
        read_log(log(tmp_path, trial_text() * 1100))


def test_command_line(tmp_path, capsys):
    (tmp_path / "row07").mkdir()
    rows(tmp_path / "row07", GOOD)
    (tmp_path / "claims.json").write_text('[{"row": 7, "steps": 250, "mean": 3.2780, "n": 4}]')
    process = start_process("scripts/logs.py", "--claims", str(tmp_path / "claims.json"), "--json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and json.loads(out)[0]["follows"]

    def run(*args):
        return logs.main([*map(str, args)]), capsys.readouterr().out

    code, out = run(tmp_path / "row07", "--steps", 250, "--mean", "3.2900", "--runs", 4)
    assert code == 1 and "does not follow" in out
    code, out = run(tmp_path / "row07", "--against", tmp_path / "row07", "--steps", 250)
    assert code == 0 and "Welch p = 1" in out
    assert run(tmp_path / "nothing")[0] == 2
    (tmp_path / "claims.json").write_text("[" * 100_000)
    assert run("--claims", tmp_path / "claims.json")[0] == 2


# ----------------------------------------------------------------------------------------------------------------------
# Broken and hostile files

MUTATIONS = [
    lambda text, r: text[: r.randrange(len(text))],
    lambda text, r: text[: (i := r.randrange(len(text)))] + bytes([text[i] ^ (1 << r.randrange(8))]) + text[i + 1 :],
    lambda text, r: text * 2,
    lambda text, r: b"\n".join(r.sample(text.split(b"\n"), text.count(b"\n"))),
    lambda text, r: text.replace(b"4.6", r.choice([b"nan", b"1e999", b"-0", b"1" + b"0" * 400, b"4.6.6", b"--4"])),
    lambda text, r: text.replace(b"step:", b"step:9" * r.randrange(1, 30)),
    lambda text, r: text.replace(b"\n", b"\r\n"),
    lambda text, r: text.replace(b" ", bytes([r.randrange(128, 256)]), 3),
    lambda text, r: text + b"step:" + b"x" * 1_000_000 + b"\n",
    lambda text, r: text.replace(b"val_loss", b"\x1b[31mval_loss<script>"),
]


def test_five_hundred_mutated_logs_give_trials_or_a_typed_error(tmp_path):
    generator = random.Random(0)
    good = (SOURCE + trial_text() * 3).encode()
    for number in range(500):
        text = good
        for mutate in generator.choices(MUTATIONS, k=generator.randrange(1, 4)):
            text = mutate(text or b"x", generator)
        path = log(tmp_path, text)
        try:
            finding = claims.check([path], claims.Claim(f"case {number}", 250, "3.3", 3), 3.28)
        except ValueError:
            continue
        assert "\x1b" not in claims.as_text(finding)
        json.dumps(finding)


def test_text_of_strangers_is_harmless():
    assert plain("a\x1b[31mb\r\nc\u202ed") == "a\ufffd[31mb\ufffd\ufffdc\ufffdd"
    assert len(plain("x" * 1000)) == 200
    assert cell("<b>|`x`[a](http://b)") == r"&lt;b&gt;\|\`x\`\[a\]\(http:&#47;&#47;b\)"


# ----------------------------------------------------------------------------------------------------------------------
# Export


def test_exported_record_reads_back_and_its_source_part_trains_to_the_same_losses(tiny_track, tmp_path):
    assert train_here(tiny_track, tmp_path / "run", "--optimizer", "muon", "--set", "train.steps=10") == 0
    (record,) = (tmp_path / "run").glob("*.jsonl")
    text = tmp_path / "log.txt"
    record.write_text(record.read_text().replace(f"{tiny_track.parent}/", ""))  # data paths from where one is
    export_record(record, text)
    (trial,) = read_log(text)
    assert trial.status == "complete"
    assert list(trial.values("val_loss").items()) == losses(tmp_path / "run")

    (tmp_path / "again.py").write_text(text.read_text().split("=" * 100)[0])
    again = [str(tmp_path / "again.py"), "--out", str(tmp_path / "again")]
    process = start_process(*again, cwd=tiny_track.parent, env={"PYTHONPATH": ""})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_export_makes_folders_and_overwrites_nothing(trained, tmp_path, capsys):
    record = tmp_path / "a.jsonl"
    record.write_text("".join(json.dumps(event) + "\n" for event in trained["muon"]))
    before, out = record.read_bytes(), tmp_path / "new" / "log.txt"
    assert logs.main(["--export", str(record), "--out", str(out)]) == 0
    assert out.exists() and capsys.readouterr().out == f"{out}\n"
    for existing in (record, out):
        assert logs.main(["--export", str(record), "--out", str(existing)]) == 2
        assert f"{existing.name} exists; name a new file" in capsys.readouterr().err
    assert record.read_bytes() == before


def test_export_needs_no_scipy(trained, tmp_path, monkeypatch):
    record = tmp_path / "a.jsonl"
    record.write_text("".join(json.dumps(event) + "\n" for event in trained["muon"]))
    monkeypatch.setitem(sys.modules, "scripts.analysis.claims", None)
    monkeypatch.delattr("scripts.analysis.claims")
    assert logs.main(["--export", str(record), "--out", str(tmp_path / "log.txt")]) == 0
    assert logs.main([str(tmp_path)]) == 2


def test_files_that_are_missing_are_named(tmp_path, capsys):
    assert logs.main(["--export", "nope", "--out", str(tmp_path / "log.txt")]) == 2
    assert capsys.readouterr().err == "error: nope: no such file\n"
    with pytest.raises(SystemExit) as error:
        logs.main(["--claims", "nope.json"])
    assert error.value.code == 2 and "no such file: nope.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x.py", "/etc/x", "a/../../x", "a\\b", "C:x", ""])
def test_names_that_lead_out_of_the_folder_are_refused(name):
    assert not is_inside(name) and is_inside("aurora/optim/aurora.py")
