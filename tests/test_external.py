"""Optimizers of other packages and of files of one's own, named as module:Class."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
import torch

import aurora
import train_gpt
from aurora.config import load_config
from aurora.errors import Exit, HarnessError
from aurora.hints import Misfit, fit
from aurora.optim import external
from aurora.trainer.optimizers import checked_hparams
from aurora.trainer.probe import NotSuited, probe
from scripts import compare, tune
from scripts.analysis.tuning import default_knobs, tuned_trials
from scripts.verification.checks import verify_run
from tests.conftest import ROOT, events, losses, often, train_here

MINE = '''
import torch

class Plain(torch.optim.Optimizer):
    """Sign descent with momentum, without a type in sight."""
    def __init__(self, params, lr=0.002, betas=(0.9, 0.99), **more):
        super().__init__(params, dict(lr=lr, betas=betas))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["m"] = state.get("m", 0) * group["betas"][0] + p.grad
                p.sub_(state["m"].sign(), alpha=float(group["lr"]))

class Forgets(Plain):
    def __init__(self, params, lr=0.002):
        super().__init__(params, lr)
        self.count = 0
    def step(self):
        self.count += 1
        for group in self.param_groups:
            group["betas"] = (0.9 / self.count, 0.0)
        super().step()

class TensorLr(Plain):
    def __init__(self, params, lr=0.002):
        super().__init__(params, torch.tensor(lr))

class Averages(Plain):
    """Judged by the average of the weights that it trains."""
    training = False
    def train(self):
        self.swap(True)
    def eval(self):
        self.swap(False)
    @torch.no_grad()
    def swap(self, training):
        if training != self.training and self.state:
            for p, state in self.state.items():
                average = state["average"].clone()
                state["average"].copy_(p)
                p.copy_(average)
        self.training = training
    @torch.no_grad()
    def step(self):
        assert self.training
        super().step()
        for p, state in self.state.items():
            state.setdefault("average", p.clone()).lerp_(p, 0.1)

class Deaf(Plain):
    """Goes by an lr of its own."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.01)

class Stubborn(Plain):
    def step(self):
        super().step()
        self.param_groups[0]["lr"] = 0.5

class Sharp(Plain):
    def first_step(self): pass
    def second_step(self): pass

class Careful(Plain):
    def step(self):
        if any((p.grad == 0).all() for group in self.param_groups for p in group["params"]):
            raise ArithmeticError("all gradients are 0")
        super().step()

class NeedsMore(Plain):
    def __init__(self, params, lr, radius):
        super().__init__(params, lr)

class NoLr(torch.optim.SGD):
    def __init__(self, params, momentum=0.9):
        super().__init__(params, lr=0.1, momentum=momentum)

def make(params, lr: float = 0.05, momentum=0.5):
    return torch.optim.SGD(params, lr=lr, momentum=momentum)

def two_groups(params, lr=0.05):
    params = list(params)
    return torch.optim.SGD([dict(params=params[::2], lr=lr), dict(params=params[1::2], lr=lr / 2)])

def partly(params, lr=0.05):
    return torch.optim.SGD(list(params)[1:], lr)

def nothing(params, lr=0.05):
    return {}
'''
CAREFUL = "its step() fails on gradients of zeros, which blocks have in the first step, below a head of zeros: Arith"


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_opts.py").write_text(MINE)
    (folder / "broken.py").write_text("import torch\nraise KeyError('x')\n")
    (folder / "wants.py").write_text("import no_such_package\n")
    return folder


@pytest.fixture(autouse=True)
def found(mine, monkeypatch):
    """Runs find the modules of that folder, as where it is the current one."""
    monkeypatch.setenv(external.FOLDER_VARIABLE, str(mine))


def matrices_and_more():
    shapes = {"embed": (10, 4), "head": (10, 4), "matrix": (8, 4), "vector": (4,)}
    return [aurora.Param(role, torch.nn.Parameter(torch.ones(shape)), role) for role, shape in shapes.items()]


# ---- what is named, and what of it is wrong ----

REFUSED = [
    ("torch.optim:Nope", (), "optimizer torch.optim:Nope: the module torch.optim has no Nope"),
    ("torch.optim:SDG", (), "has no SDG, did you mean SGD?"),
    ("torch.optm:SGD", (), "there is no module torch.optm in this environment or folder; install its package"),
    ("no_such_package:X", (), "there is no module no_such_package in"),
    ("wants:X", (), "the module wants cannot be imported: it needs no_such_package; install it"),
    ("broken:X", (), "the module broken cannot be imported: KeyError: 'x'"),
    ("torch.optim:lr_scheduler", (), "torch.optim:lr_scheduler is a module; name a class of optimizers, or a function"),
    ("torch.nn:Linear", (), "torch.nn:Linear is a class that is no torch.optim.Optimizer"),
    ("torch.optim:", (), "'torch.optim:'"),
    ("a-b:C", (), "'a-b:C' must look like module:Class, as torch.optim:SGD does"),
    ("torch.optim.SGD", (), "unknown optimizer 'torch.optim.SGD'"),
    ("torch.optim.SGD", (), "one of another package is module:Class, as in torch.optim:SGD"),
    ("my_opts:NoLr", (), "my_opts:NoLr takes no lr, which the schedule sets"),
    ("my_opts:NeedsMore", (), "optimizer.NeedsMore needs an lr, for my_opts:NeedsMore has none: --set optimizer.Needs"),
    ("my_opts:NeedsMore", ("lr=1",), "optimizer.NeedsMore lacks the key 'radius'"),
    ("my_opts:nothing", (), "optimizer.nothing: it gives a dict, which is no torch.optim.Optimizer"),
    (
        "my_opts:partly",
        (),
        "every parameter must be in exactly one optimizer group: blocks.0.attention.q.weight is",
    ),
    ("my_opts:Plain", ("betas=3",), "optimizer.Plain.betas must be a list, got 3"),
    ("my_opts:Plain", ("beta=[1.0]",), "optimizer.Plain has an unknown key 'beta', did you mean 'betas'?"),
    ("torch.optim:SGD", ("momentum=hi",), "optimizer.SGD.momentum must be a finite number, got 'hi'"),
    ("torch.optim:SGD", ("momentum=-3",), "optimizer.SGD: its constructor fails: ValueError: Invalid momentum value"),
    ("torch.optim:SGD", ("parameters=some",), "optimizer.SGD.parameters must be matrices or all, got 'some'"),
    ("torch.optim:SGD", ("parameters=all", "head_lr=1"), 'optimizer.SGD.head_lr means nothing with parameters = "all"'),
    ("muon", ("parameters=all",), 'optimizer.muon.embed_lr means nothing with parameters = "all"'),
    ("torch.optim:LBFGS", (), "torch.optim:LBFGS cannot train here: its step() needs a closure: it evaluates the loss"),
    ("torch.optim:SparseAdam", (), "cannot train here: its step() fails on gradients alone: RuntimeError: SparseAdam"),
    ("my_opts:Sharp", (), "my_opts:Sharp cannot train here: it takes two gradients a step, by first_step() and second"),
    ("my_opts:Deaf", (), "it does not go by the lr of its groups: half of it gives the same weights"),
    ("my_opts:Stubborn", (), "its step() changes the lr of its groups, so that the record could not tell which it had"),
    ("my_opts:Careful", (), CAREFUL),
    (
        "my_opts:Forgets",
        ("!train.checkpoint_every=5",),
        "train.checkpoint_every is 5, but Forgets is not resumable",
    ),
]


@pytest.mark.parametrize("optimizer, settings, message", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_written(
    tiny_track, tmp_path, capsys, optimizer, settings, message
):
    words = []
    for setting in settings:
        own = setting.removeprefix("!")
        word = own if setting != own else f"optimizer.{optimizer.rpartition(':')[2]}.{setting}"
        words += [word] if word.startswith("--") else ["--set", word]
    assert train_here(tiny_track, tmp_path, "--optimizer", optimizer, *words) == Exit.CONFIG
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


TABLE = '[optimizer.mine]\nrule = "torch.optim:SGD"\nmomentum = 1\nembed_lr = 1\n'


def test_a_table_may_name_a_rule_and_must_agree_with_the_command(tiny_track, tmp_path):
    track = tmp_path / "tiny.toml"
    track.write_text(
        tiny_track.read_text() + '[optimizer.mine]\nrule = "torch.optim:SGD"\nmomentum = 1\nembed_lr = 1\n'
    )
    config = load_config(track, "mine", ["optimizer.adamw.head_lr=7"])
    assert (config.optimizer, config.rule, config.parameters) == ("mine", "torch.optim:SGD", "matrices")
    hparams = checked_hparams(config)
    assert (hparams["lr"], hparams["momentum"], hparams["embed_lr"], hparams["head_lr"]) == (0.001, 1.0, 1.0, 7.0)
    assert type(hparams["momentum"]) is float
    assert load_config(track, "torch.optim:SGD", ["optimizer.SGD.lr=0.5"]).hparams["lr"] == 0.5
    with pytest.raises(HarnessError, match=r"has a table \[optimizer.mine\] of the rule torch.optim:SGD: give x:"):
        load_config(track, "x:mine")


def test_a_muon_with_an_adamw_of_its_own_is_told_which_part_is_its_muons(monkeypatch):
    class Muon(torch.optim.SGD):
        def __init__(self, params, lr=0.1):
            assert [group["use_muon"] for group in params] == [True]
            super().__init__(params, lr)

    monkeypatch.setattr(torch.optim, "TestMuon", Muon, raising=False)
    hparams = dict(embed_lr=1, head_lr=1, vector_lr=1, aux_betas=(0, 0), aux_eps=0, aux_weight_decay=0, lr=0.1)
    rule, _ = aurora.build("torch.optim:TestMuon", matrices_and_more(), hparams)
    assert rule.param_groups[0]["role"] == "matrix"


@pytest.mark.parametrize(
    "value, hint, expected",
    [
        (1, float, 1.0),
        (1, int | float, 1),
        (1, float | torch.Tensor, 1.0),
        (2, torch.Tensor, 2.0),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, 2, 3], tuple[float, float] | tuple[float, float, float], (1.0, 2.0, 3.0)),
        ([[1, 2], [3, 4]], list[tuple[int, int]], [(1, 2), (3, 4)]),
        (True, bool | None, True),
        (1, bool | None, None),
        (True, float, None),
        ("a", str | tuple[float, ...], "a"),
        (float("nan"), float, None),
        (1.5, int, None),
        ([1.0], tuple[float, float], None),
        ({"a": 1}, dict, {"a": 1}),
        ("x", type, None),
    ],
)
def test_values_of_toml_fit_types(value, hint, expected):
    if expected is None:
        with pytest.raises(Misfit):
            fit(value, hint)
    else:
        found = fit(value, hint)
        assert found == expected and type(found) is type(expected)


# ---- the probe ----


def probe_of(name):
    hparams = {"lr": 0.1}
    rule = external.find(name)
    return probe(lambda own: external.make(rule, own, hparams, "matrix"), [torch.Size([96, 8])], torch.device("cpu"))


def test_the_probe_tells_what_a_state_dict_lacks_and_leaves_no_trace():
    before, begin_s = torch.get_rng_state(), time.monotonic()
    assert not any(
        probe_of(name) for name in ("torch.optim:SGD", "torch.optim:Adam", "my_opts:TensorLr", "my_opts:make")
    )
    assert time.monotonic() - begin_s < 3, "four in under a second each"
    assert "more than its state_dict() holds" in probe_of("my_opts:Forgets")
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(NotSuited):
        probe_of("my_opts:Deaf")


# ---- whole runs ----


@pytest.mark.parametrize(
    "optimizer, words",
    [
        ("my_opts:Plain", ()),
        often(("my_opts:make", ("optimizer.make.lr=0.1",)), False),
        often(("my_opts:TensorLr", ()), False),
        ("my_opts:two_groups", ()),
        often(("my_opts:Forgets", ()), False),
        ("torch.optim:Adam", ("optimizer.Adam.parameters=all", "optimizer.Adam.betas=[0.9, 0.95]")),
    ],
)
def test_a_run_and_its_record(tiny_track, tmp_path, optimizer, words):
    settings = [word for override in ("train.steps=10", *words) for word in ("--set", override)]
    assert train_here(tiny_track, tmp_path, "--optimizer", optimizer, *settings) == 0
    (_, first), *_, (_, last) = losses(tmp_path)
    assert last < first
    (path,) = tmp_path.glob("*.jsonl")
    verdict = verify_run(path)
    assert (verdict.word, verdict.reasons) == ("consistent", []), verdict
    assert any("not checked are its code and the bounds of its settings" in note for note in verdict.notes)
    start = events(tmp_path)[0]
    name = optimizer.rpartition(":")[2]
    assert start["optimizer"] == name and start["config"]["rule"] == optimizer and f"-{name}-s0-" in start["run_id"]
    assert start["resumable"] == (name != "Forgets")
    if optimizer.startswith("my_opts"):
        assert start["sources"]["external/my_opts.py"] == MINE
    assert not [source for source in start["sources"] if "torch" in source]
    modules = {start["config"]["rule"].partition(":")[0].partition(".")[0], start["rule"]["class"].partition(".")[0]}
    known = {"my_opts": "", "torch": f"torch {torch.__version__}"}
    assert start["rule"]["packages"] == {module: known[module] for module in modules}


TAMPERED = [
    ("config.rule", "my_opts:Other"),
    ("config.parameters", "all"),
    ("rule.class", "my_opts.Other"),
    ("rule.packages", {"my_opts": "", "evil": "evil 1.0"}),
    ("rule.packages", {"my_opts": 7}),
    ("resumable", 3),
    ("hparams.lr", 0.003),
    ("hparams.betas", [0.9, 0.5]),
    ("param_groups.0.peak_lr", 0.003),
    ("param_groups.0.optimizer", "Other"),
    ("rule", None),
]


def test_tampering_with_a_record_is_refuted(tiny_track, tmp_path):
    words = ["--set", "train.steps=5", "--set", "optimizer.Plain.betas=[0.8, 0.99]"]
    assert train_here(tiny_track, tmp_path / "run", "--optimizer", "my_opts:Plain", *words) == 0
    (path,) = (tmp_path / "run").glob("*.jsonl")
    start, *rest = path.read_text().splitlines(keepends=True)
    for key, value in TAMPERED:
        event = json.loads(start)
        *parents, last = key.split(".")
        targets = [event, event["config"]] if parents == ["hparams"] else [event]  # which agree with each other
        for table in targets:
            for parent in parents:
                table = table[int(parent) if parent.isdecimal() else parent]
            table[int(last) if last.isdecimal() else last] = value
            if value is None:
                del table[last]
        copy = tmp_path / path.name
        copy.write_text(json.dumps(event) + "\n" + "".join(rest))
        assert verify_run(copy).reasons, key


def test_weights_to_judge_are_apart_from_those_to_train(tiny_track, tmp_path):
    """A validation changes no bit of the training, and resuming goes on with the weights that were trained."""
    hashes = set()
    for name, every in (("often", 2), ("seldom", 10)):
        words = ["--set", "train.steps=6", "--set", f"eval.every={every}", "--set", f"eval.late_every={every}"]
        assert train_here(tiny_track, tmp_path / name, "--optimizer", "my_opts:Averages", *words) == 0
        hashes.add(events(tmp_path / name)[-1]["weights_sha256"])
        (record,) = (tmp_path / name).glob("*.jsonl")
        assert verify_run(record).reasons == [], "also of the weights beside it"
    assert len(hashes) == 1


def is_killed_and_goes_on(track, launch, folder, optimizer, settings, world_size):
    """Whether a run that is killed and resumed has the weights and losses of one that was not; and those losses."""
    env = {external.FOLDER_VARIABLE: os.environ[external.FOLDER_VARIABLE]}  # of the test, not of the launcher
    words = [*track, "--optimizer", optimizer, *(word for setting in settings for word in ("--set", setting))]
    assert launch(*words, "--out", folder / "whole", world_size=world_size, env=env).codes == [0] * world_size
    killed = launch(*words, "--out", folder / "killed", world_size=world_size, fault="kill:updated:7", env=env)
    assert killed.codes[0] == -9
    resumed = launch(*words, "--out", folder / "killed", "--resume", world_size=world_size, env=env)
    assert resumed.codes == [0] * world_size, resumed.err
    assert "resume: from step 6" in resumed.out[0]
    ends = [events(folder / name)[-1] for name in ("whole", "killed")]
    return ends[0]["weights_sha256"] == ends[1]["weights_sha256"], dict(losses(folder / "whole"))


@pytest.mark.parametrize(
    "settings",
    [
        ["my_opts:Averages"],
        [
            "torch.optim:SGD",
            *("--set", "optimizer.SGD.lr=0.1", "--set", "optimizer.SGD.weight_decay=0.1"),
            *("--set", "optimizer.SGD.schedule.weight_decay=[{until = 1.0, from = 1.0, to = 0.0}]"),
        ],
    ],
    ids=["averages", "scheduled"],
)
def test_a_crashed_run_goes_on_to_the_bit(tiny_track, tmp_path, monkeypatch, settings):
    words = ["--optimizer", *settings, "--set", "train.steps=8", "--set", "train.checkpoint_every=3"]
    assert train_here(tiny_track, tmp_path / "whole", *words) == 0
    step = train_gpt.train_step

    def crash_at_7(run, model, number):
        if number == 7:
            raise ZeroDivisionError
        return step(run, model, number)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_gpt, "train_step", crash_at_7)
        train_here(tiny_track, tmp_path / "crashed", *words)
    assert train_here(tiny_track, tmp_path / "crashed", *words, "--resume") == 0
    whole, crashed = (events(tmp_path / name) for name in ("whole", "crashed"))
    assert [event["step"] for event in crashed if event["event"] == "resume"] == [6]
    assert whole[-1]["weights_sha256"] == crashed[-1]["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_goes_on_to_the_bit(twelve_steps, launch, tmp_path, world_size):
    assert is_killed_and_goes_on(twelve_steps, launch, tmp_path, "my_opts:Averages", (), world_size)[0]


@pytest.mark.slow
def test_a_run_that_is_not_resumable_stops_without_a_checkpoint(twelve_steps, launch, tmp_path, mine):
    words = [*twelve_steps, "--optimizer", "my_opts:Forgets", "--out", tmp_path, "--set", "train.checkpoint_every=0"]
    stopped = launch(*words, fault="term:updated:3", env={external.FOLDER_VARIABLE: str(mine)})
    assert stopped.codes == [Exit.PREEMPTED] and not list(tmp_path.glob("*.checkpoints"))
    assert "without a checkpoint, for the optimizer is not resumable; start anew" in stopped.err[0]
    assert "Forgets is not resumable, so no checkpoint is written" in stopped.out[0]
    again = launch(*words, "--resume", env={external.FOLDER_VARIABLE: str(mine)})
    assert again.codes == [Exit.CONFIG]
    assert "was cut, and Forgets is not resumable: it keeps more than its state_dict() holds" in again.err[0]
    next(tmp_path.glob("*.jsonl")).unlink()
    for said in ("starting at step 0", "is this run from its start to its end"):  # the second time it is done
        again = launch(*words, "--resume", env={external.FOLDER_VARIABLE: str(mine)})
        assert again.codes == [0] and said in again.out[0] + again.err[0]


OF_PYTORCH_OPTIMIZER = ("Lion", "SOAP", "AdEMAMix", "ScheduleFreeAdamW", "Shampoo", "Muon")
LIBRARIES = {
    **dict.fromkeys(("torch.optim:SGD", "torch.optim:Adam", "torch.optim:NAdam", "torch.optim:Adafactor"), ()),
    "torch.optim:Muon": (),
    **{
        f"pytorch_optimizer:{name}": () for name in ("Lion", "SOAP", "AdEMAMix", "ScheduleFreeAdamW", "Shampoo", "Muon")
    },
    "heavyball:SOAP": (),
    "heavyball:SFAdamW": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", LIBRARIES)
def test_optimizers_of_libraries_go_on_after_a_kill_on_one_rank_and_two(twelve_steps, launch, tmp_path, optimizer):
    if importlib.util.find_spec(optimizer.partition(".")[0].partition(":")[0]) is None:
        pytest.skip(f"{optimizer} is not installed")
    found = []
    for world_size in (1, 2):
        is_same, values = is_killed_and_goes_on(
            twelve_steps, launch, tmp_path / str(world_size), optimizer, LIBRARIES[optimizer], world_size
        )
        assert is_same, f"{optimizer} on {world_size}"
        found.append(values)
    for step, loss in found[0].items():
        assert found[1][step] == pytest.approx(loss, abs=1e-3)
    for path in tmp_path.glob("*/*/*.jsonl"):
        assert verify_run(path).reasons == []
    print(optimizer, *(values[12] for values in found))


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, message",
    [
        ("pytorch_optimizer:SAM", "it takes two gradients a step"),
        ("pytorch_optimizer:AdaHessian", "it wants backward(create_graph=True)"),
        ("pytorch_optimizer:SophiaH", "it wants backward(create_graph=True)"),
        ("heavyball:PSGDKron", "Set it manually using `precond_init_scale=0.1`"),
    ],
)
def test_optimizers_of_libraries_that_need_more_are_refused_by_name(tiny_track, tmp_path, capsys, optimizer, message):
    pytest.importorskip(optimizer.partition(":")[0])
    assert train_here(tiny_track, tmp_path, "--optimizer", optimizer) == Exit.CONFIG
    err = capsys.readouterr().err
    assert f"{optimizer} cannot train here: " in err and message in err


@pytest.mark.slow
def test_psgd_is_not_resumable_and_says_so(tiny_track, tmp_path, capsys):
    pytest.importorskip("heavyball")
    words = ["--optimizer", "heavyball:PSGDKron", "--set", "optimizer.PSGDKron.precond_init_scale=0.1"]
    assert train_here(tiny_track, tmp_path, *words, "--set", "train.checkpoint_every=5") == Exit.CONFIG
    assert "PSGDKron is not resumable: what it loads is not what its state_dict() holds" in capsys.readouterr().err
    assert train_here(tiny_track, tmp_path, *words) == 0
    assert events(tmp_path)[0]["resumable"] is False and losses(tmp_path)[-1][1] < 4.1


# ---- comparing and tuning ----


def test_compare_takes_optimizers_as_arguments_and_their_tuned_values(capsys):
    args = compare.parse_args(["my_opts:Plain", "muon", "--grid", "optimizer.lr=1,2"])
    args.tuned = {"my_opts:Plain": ["optimizer.Plain.lr=0.5"]}
    plan = compare.plan_runs(args)
    assert [planned.argv[3] for planned in plan] == ["my_opts:Plain", "muon"] * 2
    assert plan[0].argv[-4:] == ["--set", "optimizer.Plain.lr=0.5", "--set", "optimizer.Plain.lr=1"]
    assert plan[1].argv[-2:] == ["--set", "optimizer.muon.lr=1"]
    args = compare.parse_args(["my_opts:Plain", "muon", "--set", "optimizer.Plain.lr=2", "--set", "train.steps=3"])
    settings = [planned.argv[7::2] for planned in compare.plan_runs(args)]
    assert settings == [["optimizer.Plain.lr=2", "train.steps=3"], ["train.steps=3"]], "muon's track has no such table"
    assert compare.parse_args([]).optimizers == compare.DEFAULT_OPTIMIZERS
    for words in (["muon", "--optimizers", "adamw"], ["muon", "--tune", "0"], ["muon", "--tune", "2", "--nproc", "2"]):
        with pytest.raises(SystemExit):
            compare.parse_args(words)
    capsys.readouterr()


def test_an_optimizer_without_a_space_has_its_lrs_searched_around_what_it_has(tiny_track):
    args = tune.parse_args(["--config", str(tiny_track), "--optimizers", "my_opts:Plain", "torch.optim:SGD"])
    space = tune.declared_space(args)
    assert space.seed == 100 and list(space.knobs) == ["my_opts:Plain", "torch.optim:SGD"]
    assert list(map(str, space.knobs["my_opts:Plain"])) == [
        "lr from 0.002 by factors of 2",
        "aux_lr from 0.003 by factors of 2",
    ]
    assert space.knobs["torch.optim:SGD"][0].start == 0.001
    argv = tune.Tuner.argv(argparse.Namespace(args=args, space=space), "my_opts:Plain", {"lr": 0.004, "aux_lr": 0.1})
    assert "optimizer.Plain.lr=0.004" in argv and "optimizer.Plain.vector_lr=0.1" in argv
    unlike = default_knobs({"lr": 1.0, "embed_lr": 0.7, "head_lr": 0.004, "vector_lr": 0.7})
    assert [(knob.name, knob.keys) for knob in unlike[1:]] == [
        ("embed_lr", ["embed_lr", "vector_lr"]),
        ("head_lr", ["head_lr"]),
    ]


def test_which_optimizers_of_a_track_are_tuned(tiny_track, tmp_path, capsys):
    tuned = tuned_trials((ROOT / "configs" / "quick.toml").read_text())
    assert tuned == dict.fromkeys(("adamw", "muon", "unormuon", "aurora"), 16)
    command = ["--config", str(tiny_track), "--optimizers", "my_opts:Plain", "--out", str(tmp_path), "--write"]
    assert tune.main(command) == 2
    assert "--write: my_opts:Plain has no table in" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_in_ones_own_folder_is_tuned_compared_verified_and_replayed(tiny_track, mine, tmp_path):
    out = tmp_path / "out"
    command = ["my_opts:Plain", "adamw", "--tune", "1", "--config", str(tiny_track), "--set", "train.steps=5"]
    environment = {key: value for key, value in os.environ.items() if key != external.FOLDER_VARIABLE}

    def run(script, *words):
        command = [sys.executable, str(ROOT / "scripts" / script), *words]
        done = subprocess.run(command, cwd=mine, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run("compare.py", *command, "--out", str(out))
    assert "Plain" in (out / "comparison.md").read_text()
    ledger = json.loads((tmp_path / "out_tuning" / "ledger.json").read_text())
    assert [entry["optimizer"] for entry in ledger] == ["adamw", "my_opts:Plain"]
    assert ledger[1]["space"] == "lr from 0.002 by factors of 2; aux_lr from 0.003 by factors of 2"
    assert run("compare.py", *command, "--out", str(out)).count("finished before") == 2 > said.count("finished before")
    (record,) = out.glob("*Plain*.jsonl")
    assert "replayed" in run("verify.py", str(record), "--replay")
