"""Tracks load with every optimizer; whatever is wrong in one is named."""

import dataclasses
import importlib.util
import re
import tomllib

import pytest

import train_gpt
from aurora.command_line import parse_args
from aurora.config import load_config
from aurora.errors import Exit, HarnessError
from aurora.trainer.optimizers import checked_hparams
from aurora.trainer.setup import check_schedule
from tests.conftest import OPTIMIZERS, ROOT, train_here

TRACKS = sorted((ROOT / "configs").glob("*.toml"))


def test_there_are_tracks():
    sizes = {f"gpt2_{name}.toml" for name in ("small", "small_short", "medium", "350m", "1b")}
    assert {"quick.toml", *sizes} <= {path.name for path in TRACKS}


# Weights of matrices, of the embedding as of the head; tokens that are trained on with Muon.
SIZES = {
    "gpt2_small": (84_934_656, 38_633_472, 1_703_936_000),
    "gpt2_small_short": (84_934_656, 38_633_472, 8_192_000),
    "gpt2_medium": (201_326_592, 51_511_296, 3_748_659_200),
    "gpt2_350m": (245_366_784, 51_511_296, 6_973_030_400),
    "gpt2_1b": (872_415_232, 103_022_592, 9_961_472_000),
}


@pytest.mark.parametrize("track", TRACKS, ids=lambda path: path.stem)
def test_dry_run_of_every_track_with_every_optimizer(track, tmp_path, capsys):
    for optimizer in tomllib.loads(track.read_text())["optimizer"]:
        assert train_here(track, tmp_path, "--optimizer", optimizer, "--dry-run") == 0
        report = capsys.readouterr().out
        assert f"{optimizer}: " in report and "memory of a rank, GiB" in report
        if track.stem in SIZES and optimizer == "muon":
            matrices, embed, tokens = (f"{count:,}" for count in SIZES[track.stem])
            roles = [line.split() for line in report.splitlines() if line.startswith(("matrix", "embed", "head "))]
            assert [words[2] for words in roles] == [matrices, embed, embed]
            assert f" = {tokens} for training" in report
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("track", TRACKS, ids=lambda path: path.stem)
def test_every_track_builds_every_optimizer(track):
    optimizers = tomllib.loads(track.read_text())["optimizer"]
    if track.stem != "trial":  # of arms of its own
        assert {*OPTIMIZERS} - {"riemannian_aurora"} <= optimizers.keys()
    for optimizer in optimizers:
        config = load_config(track, optimizer)
        assert checked_hparams(config)["lr"] == config.hparams["lr"]


def test_overrides_take_toml_values_and_plain_words(tiny_track):
    overrides = ["train.steps=7", "eval.target=3", "data.train=some/where_*.bin", "optimizer.muon.nesterov=false"]
    config = load_config(tiny_track, "muon", overrides)
    assert (config.train.steps, config.eval.target, config.data.train) == (7, 3.0, "some/where_*.bin")
    assert isinstance(config.eval.target, float) and config.hparams["nesterov"] is False


BAD_VALUES = [
    ("eval.target=abc", "eval.target must be a finite number, got 'abc'"),
    ("eval.target=nan", "eval.target must be a finite number, got nan"),
    ("train.steps=ten", "train.steps must be a whole number, got 'ten'"),
    ("train.steps=1.5", "train.steps must be a whole number, got 1.5"),
    ("train.steps=0", "train.steps must be at least 1, got 0"),
    ("train.stepz=10", "train has an unknown key 'stepz', did you mean 'steps'"),
    ("trian.steps=10", "no table 'trian', did you mean 'train'"),
    ("steps=10", "must look like train.steps=100"),
    ("optimizer.aurora=5", "optimizer must hold tables"),
    ("train.steps", "must look like train.steps=100"),
    ("train.steps=100000000", "train.steps must be at most 1000000, got 100000000"),
    ("model.num_layers=100000", "model.num_layers must be at most 256, got 100000"),
    ("model.model_dim=" + "9" * 400, "model.model_dim must be at most 65536, got a number of more than 40 digits"),
    ("eval.target=" + "9" * 400, "eval.target must be a finite number, got a number of more than 40 digits"),
    ("eval.every=" + "9" * 5000, "eval.every must be a whole number, got '9999"),
    ("eval.late_frac=[0x" + "f" * 5000 + "]", "eval.late_frac must be a finite number, got a list of huge numbers"),
    ("eval.late_frac=" + "[" * 5000, "eval.late_frac must be a finite number, got '[[["),
    ("train.batch_tokens=500", "train.batch_tokens must be a multiple of model.seq_len = 32, got 500"),
    ("train.micro_batch=3", "micro_batch = 3 does not divide the 16 sequences"),
    ("train.micro_batch=all", "train.micro_batch must be a whole number or \"auto\", got 'all'"),
    ("train.micro_batch=0", "train.micro_batch must be at least 1, got 0"),
    ("train.compile=maybe", "train.compile must be auto, on or off, got 'maybe'"),
    ("model.mlp=gelu", "model.mlp must be relu2 or swiglu, got 'gelu'"),
    ("model.head_dtype=fp8", "model.head_dtype must be activation or float8, got 'fp8'"),
    ("model.num_heads=3", "must be a multiple of 4"),
    ("model.num_heads=0", "model.num_heads must be at least 1"),
    ("model.activation_dtype=float16", "float32 or bfloat16"),
    ("model.vocab_size=70000", "at most 65536"),
    ("schedule.cooldown_frac=2", "schedule.cooldown_frac must be in"),
    ("optimizer.muon.momentun=0.9", "optimizer.muon has an unknown key 'momentun', did you mean 'momentum'"),
    ("optimizer.muon.lr=fast", "optimizer.muon.lr must be a finite number, got 'fast'"),
    ("optimizer.muon.embed_lr=inf", "optimizer.muon.embed_lr must be a finite number, got inf"),
    ("eval.target=-1", "eval.target must be a positive loss, got -1.0"),
    ("optimizer.muon.lr=-1", "optimizer.muon: lr must be at least 0"),
    ("optimizer.muon.nesterov=1", "optimizer.muon.nesterov must be true or false, got 1"),
    ("optimizer.muon.aux_betas=[0.9]", "aux_betas must be two numbers"),
    ("optimizer.muon.aux_betas=[0.9, 1.5]", "optimizer.muon: aux_betas must be two numbers in"),
    ("optimizer.muon.polar_schedule=ns9", "polar_schedule must be one of ns5_jordan"),
    ("optimizer.muon.warmup_steps=-1", "warmup_steps must be at least 0"),
]


@pytest.mark.parametrize("override, message", BAD_VALUES)
def test_bad_value_exits_2_with_one_line_before_anything_is_written(tiny_track, tmp_path, capsys, override, message):
    assert train_here(tiny_track, tmp_path / "out", "--optimizer", "muon", "--set", override) == Exit.CONFIG
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.glob("out/*"))


def test_schedules_of_any_length_are_checked_by_a_few_looks(tiny_track):
    looks = []

    def scheduled(step, group, config):
        looks.append(step)
        return train_gpt.scheduled(step, group, config)

    for fitting, too_long, cooldown_frac in ((1, 2, 1.0), (500_001, 500_010, 0.5)):
        config = load_config(tiny_track, "muon", ["train.steps=1000000", f"schedule.cooldown_frac={cooldown_frac}"])
        check_schedule(dataclasses.replace(config, warmup_steps=fitting), scheduled)
        with pytest.raises(HarnessError, match="leave no step for it"):
            check_schedule(dataclasses.replace(config, warmup_steps=too_long), scheduled)
    assert len(looks) < 50_000


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_track_in_another_encoding_is_named(tiny_track, tmp_path, capsys, encoding):
    config = tmp_path / "c.toml"
    config.write_bytes(tiny_track.read_text().encode(encoding))
    assert train_here(config, tmp_path / "out") == Exit.CONFIG
    assert f"c.toml is in {encoding}; save it as UTF-8" in capsys.readouterr().err


def test_unknown_optimizer_is_answered_with_the_nearest_name(tiny_track, tmp_path, capsys):
    assert train_here(tiny_track, tmp_path, "--optimizer", "munon") == Exit.CONFIG
    assert "unknown optimizer 'munon', did you mean 'muon'" in capsys.readouterr().err


def test_table_of_a_rule_that_does_not_exist_is_refused(tiny_track, tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text(tiny_track.read_text().replace("[optimizer.muon]", "[optimizer.moon]"))
    assert train_here(config, tmp_path, "--optimizer", "moon") == Exit.CONFIG
    assert "[optimizer.moon]: there is no aurora/optim/moon.py" in capsys.readouterr().err


def test_a_setting_of_another_rule_is_said_to_change_nothing(tiny_track, tmp_path, capsys):
    arguments = ["--dry-run", "--optimizer", "muon", "--set", "optimizer.muon.lr=0.01", "--set"]
    assert train_here(tiny_track, tmp_path, *arguments, "optimizer.aurora.lr=0.03") == 0
    said = capsys.readouterr().out
    assert "--set optimizer.aurora.lr=0.03 changes nothing for muon\n" in said and "muon.lr" not in said
    assert train_here(tiny_track, tmp_path, *arguments, "train.steps=20") == 0
    assert "changes nothing" not in capsys.readouterr().out


@pytest.mark.parametrize("section", ["model", "data", "train", "eval", "schedule"])
def test_missing_table_or_key_is_named(tiny_track, tmp_path, section):
    text = tiny_track.read_text()
    without_table = re.sub(rf"\[{section}\]\n(?:[^\[\n].*\n)*", "", text)
    config = tmp_path / "c.toml"
    config.write_text(without_table)
    with pytest.raises(HarnessError, match=f"lacks the key '{section}'"):
        load_config(config, "muon")
    key = re.search(rf"\[{section}\]\n(\w+)", text).group(1)
    config.write_text(re.sub(rf"(\[{section}\]\n).*\n", r"\1", text))
    with pytest.raises(HarnessError, match=f"{section} lacks the key '{key}'"):
        load_config(config, "muon")


@pytest.mark.parametrize("content, message", [(None, "cannot be read"), ("a = [", "not valid TOML")])
def test_unreadable_config_exits_2(tmp_path, capsys, content, message):
    config = tmp_path / "c.toml"
    if content:
        config.write_text(content)
    assert train_here(config, tmp_path) == Exit.CONFIG
    assert message in capsys.readouterr().err


def test_gpt2_small_is_the_public_task():
    config = load_config(ROOT / "configs/gpt2_small.toml", "muon")
    assert (config.train.steps, config.train.batch_tokens, config.eval.tokens) == (3250, 524288, 10485760)
    assert (config.eval.target, config.schedule.cooldown_frac) == (3.28, 0.7)
    steps = train_gpt.validation_steps(config)
    expected = {s for s in range(3250) if s % (125 if s / 3250 < 0.9 else 25) == 0} | {3250}
    assert steps == expected


def test_an_optimizers_own_steps_hold_unless_the_command_line_says_otherwise(tiny_track, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(tiny_track.read_text().replace("[optimizer.adamw]", "[optimizer.adamw]\nsteps = 9"))
    assert [load_config(path, name).train.steps for name in ("adamw", "muon")] == [9, 30]
    assert load_config(path, "adamw", ["optimizer.adamw.steps=12"]).train.steps == 12
    assert load_config(path, "adamw", ["optimizer.adamw.steps=12", "train.steps=7"]).train.steps == 7
    assert "steps" not in load_config(path, "adamw").hparams
    with pytest.raises(HarnessError, match="optimizer.adamw.steps must be a whole number"):
        load_config(path, "adamw", ["optimizer.adamw.steps=1.5"])
    assert load_config(ROOT / "configs/gpt2_small.toml", "adamw").train.steps == 4950


def test_lr_schedule_is_flat_then_linear_with_the_optimizers_own_warm_up(tiny_track):
    overrides = ["train.steps=100", "schedule.cooldown_frac=0.4", "optimizer.muon.warmup_steps=4"]
    config = load_config(tiny_track, "muon", overrides)
    group = {"role": "matrix", "peak_lr": 1.0}
    scales = [train_gpt.scheduled(step, group, config)["lr"] for step in range(100)]
    assert scales[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(scales[4:60]) == {1.0}
    assert scales[80] == pytest.approx(0.5) and scales[99] == pytest.approx(0.025)
    config = load_config(tiny_track, "muon", ["train.steps=100", "schedule.final_lr_frac=0.1"])
    assert train_gpt.scheduled(99, group, config)["lr"] == pytest.approx(0.1 + 0.9 * 0.01 / 0.4)


def test_dry_run_of_gpt2_small_counts_parameters_tokens_and_shards(tmp_path, capsys):
    assert train_here(ROOT / "configs/gpt2_small.toml", tmp_path, "--optimizer", "muon", "--dry-run") == 0
    report = capsys.readouterr().out
    for role, count, settings in [
        ("embed", "38,633,472", ["AdamW", "0.7", "0.001"]),
        ("head", "38,633,472", ["AdamW", "0.004", "0.001"]),
        ("matrix", "84,934,656", ["Muon", "0.025", "0.05"]),
    ]:
        (line,) = [line for line in report.splitlines() if line.startswith(role)]
        assert count in line and line.split()[-3:] == settings
    assert "head's bias of 50,304" in report
    assert (
        "3,250 steps x 524,288 = 1,703,936,000" in report
        and "MISSING, the run takes 18 of 100,000,000 tokens: " in report
    )
    assert "memory of a rank, GiB" in report
    by_size = dict(re.findall(r"(\d+): (\d+\.\d)", report.partition("by micro-batch: ")[2].partition("\n")[0]))
    assert list(by_size) == ["1", "2", "4", "8", "16", "32", "64", "128"] and "x 128 sequences" in report
    assert float(by_size["8"]) < 7.5 and float(by_size["32"]) < 22, "for cards of 8 and 24 GB"


def test_a_python_without_numpy_is_told_before_anything_is_imported(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numpy" else find_spec(name))
    with pytest.raises(SystemExit) as error:
        parse_args("", [])
    assert error.value.code == 2 and "this python has no numpy; source .venv" in capsys.readouterr().err


def test_both_laptop_tracks_have_the_same_optimizers():
    quick, bf16 = (tomllib.loads((ROOT / f"configs/{name}.toml").read_text()) for name in ("quick", "quick_bf16"))
    assert bf16["optimizer"] == quick["optimizer"]
