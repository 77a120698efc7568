"""What is done with finished runs: models are loaded, write, are scored, are exported. Strangers' files run nothing."""

import importlib
import importlib.util
import json
import math
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import scripts.compare
import scripts.evaluate
import scripts.export_model
import scripts.generate
from aurora.errors import Exit, HarnessError
from aurora.tokens.shards import write_shard
from aurora.trainer.checkpoint import write_weights
from aurora.trainer.ranks import digest
from aurora.trainer.weights import read_header, weights_of
from scripts.analysis.evaluation import Evaluation, evaluations_of, ratio, run_table
from scripts.models.export import export
from scripts.models.hellaswag import evaluate_hellaswag, read_items
from scripts.models.likelihood import score, windows
from scripts.models.load import find_record, load, read_tensors
from scripts.models.sampling import Sampling, draw, sample
from scripts.models.source import SourceError, is_same_code, model_source, source_here
from scripts.models.text import evaluate_text, evaluate_tokens, evaluate_validation
from scripts.models.vocabulary import Vocabulary
from tests.conftest import ROOT, start_process
from tests.models import (
    GPT2,
    QUICK,
    TEXT,
    edited_run,
    hellaswag_items,
    train_and_keep,
    write_bytes_track,
    write_gpt2_track,
)
from tests.test_docs import blocks


@pytest.fixture(scope="module")
def track(tmp_path_factory):
    return write_bytes_track(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def runs(track, tmp_path_factory):
    """Record and trainer's model of runs that differ in settings, each made once."""
    made = {}

    def run(*settings, seed=0):
        key = (*settings, seed)
        if key not in made:
            out = tmp_path_factory.mktemp("run")
            made[key] = train_and_keep(track, out, *QUICK, *settings, seed=seed)
        return made[key]

    return run


@pytest.fixture
def copied(runs, tmp_path):
    """A record with its weights that a test may spoil."""
    record, _ = runs()
    for path in (record, weights_of(record)):
        shutil.copy(path, tmp_path)
    return tmp_path / record.name


VARIANTS = {
    "relu2": [],
    "swiglu": ["model.mlp=swiglu", "model.bias=false", "train.steps=4"],
    "bfloat16": ["model.activation_dtype=bfloat16", "train.steps=2"],
}
TOKENS = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loaded_model_is_the_trainers(runs, variant):
    record, model = runs(*VARIANTS[variant])
    trained = load(record)
    with torch.no_grad():
        assert torch.equal(trained.model.logits(TOKENS), model.logits(TOKENS))
    assert is_same_code(trained.source, source_here())


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_per_byte_are_the_trainers_validation_loss(runs, variant):
    """In bfloat16 the trainer's fast pass rounds elsewhere."""
    record, _ = runs(*VARIANTS[variant])
    trained = load(record)
    found, loss = evaluate_validation(trained), trained.run.end_event["val_loss"]
    assert found.estimate().value == pytest.approx(loss / math.log(2), rel=1e-3 if variant == "bfloat16" else 1e-6)
    assert found.details["perplexity"] == pytest.approx(math.exp(loss), rel=1e-2 if variant == "bfloat16" else 1e-5)
    assert found.details["tokens"] == found.details["bytes"] == 2048 and len(found.sums) > 5


def test_a_model_of_gpt2s_tokens(gpt2_files, tmp_path, capsys):
    record, model = train_and_keep(write_gpt2_track(tmp_path), tmp_path / "out", *GPT2)
    trained = load(record)
    with torch.no_grad():
        assert torch.equal(trained.model.logits(TOKENS[:, :30]), model.logits(TOKENS[:, :30]))
    found = evaluate_validation(trained)
    loss = trained.run.end_event["val_loss"]
    assert found.details["nats_per_token"] == pytest.approx(loss, rel=1e-6)
    assert found.estimate().value * found.details["bytes"] == pytest.approx(256 * loss / math.log(2), rel=1e-6)
    assert len(found.sums) == 3 and found.details["bytes"] > 256  # a document every 100 tokens; its start has no byte
    text = tmp_path / "text.txt"
    text.write_text("Füße.<|endoftext|>It's 5.")
    assert list(evaluate_text(trained, text).sizes) == [7, 7]
    assert scripts.generate.main([str(record), "--prompt", "Füße", "--max-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("Füße")


EDIT = {
    "up.relu().square()": "squared(up)",
    "class RMSNorm(": "def squared(x):\n    return 0.5 * x.square()\n\n\nclass RMSNorm(",
    "    def trunk": "        self.head.weight = self.embed.weight\n\n    def trunk",
}


@pytest.fixture(scope="module")
def edited(track, tmp_path_factory):
    return edited_run(track, tmp_path_factory.mktemp("edited"), EDIT)


def test_an_edited_model_is_taken_from_the_record_if_it_is_trusted(edited):
    record, model = edited
    with pytest.raises(HarnessError, match="not that of this checkout, and nothing of it was run; --trust") as error:
        load(record)
    assert error.value.reason == Exit.CHECKPOINT
    trained = load(record, is_trusted=True)
    with torch.no_grad():
        assert torch.equal(trained.model.logits(TOKENS), model.logits(TOKENS))
    assert "def squared" in trained.source and "aurora" not in trained.source.replace("aurora/fast", "")


# ---- files of strangers ----


def weights_with(record, change, is_sealed=True):
    """Other weights beside the record, which is made to state their hash if they are sealed."""
    path = weights_of(record)
    tensors = change(dict(read_tensors(path, read_header(path))))
    write_weights(path, tensors, {"format": "pt", "script": "__import__('os').system('touch ran')"})
    if is_sealed:
        change_record(record, lambda start, end: end.update(weights_sha256=digest(tensors)))


def change_record(record, change):
    start, *events, end = map(json.loads, record.read_text().splitlines())
    change(start, end)
    record.write_text("".join(json.dumps(event) + "\n" for event in (start, *events, end)))


HEAD = "head.weight"


def with_tensor(name, value):
    """Weights with one tensor that is another, or left out."""

    def change(tensors):
        return {key: value(tensors[key]) if key == name else tensors[key] for key in tensors if value or key != name}

    return lambda record: weights_with(record, change)


def in_start(change):
    return lambda record: change_record(record, lambda start, end: change(start["config"]))


WEIGHTS = {
    "other numbers": (lambda r: weights_with(r, lambda t: {**t, HEAD: 2 * t[HEAD]}, False), "not those of the record"),
    "one tensor less": (with_tensor(HEAD, None), "lack 'head.weight'"),
    "one more": (lambda r: weights_with(r, lambda t: {**t, "x": torch.ones(1)}), "have, beyond the model, 'x'"),
    "wrong shape": (with_tensor(HEAD, lambda t: t[:5]), "the model's is"),
    "wrong dtype": (with_tensor(HEAD, lambda t: t.half()), "torch.float16"),
    "cut": (lambda r: weights_of(r).write_bytes(weights_of(r).read_bytes()[:-100]), "are damaged"),
    "a pickle": (lambda r: torch.save({"x": Explosive()}, weights_of(r)), "no safetensors file"),
    "none": (lambda r: weights_of(r).unlink(), "has no weights beside it"),
    "a link to nothing": (lambda r: (weights_of(r).unlink(), weights_of(r).symlink_to("x")), "no such file"),
    "a run that was stopped": (
        lambda r: change_record(r, lambda _, end: end.update(status="interrupted")),
        "is interr",
    ),
    "a billion layers": (in_start(lambda config: config["model"].update(num_layers=10**9)), "no run can have"),
    "a setting that is none": (in_start(lambda config: config["model"].update(x="__import__('os')")), "cannot be made"),
    "no settings": (in_start(lambda config: config.update(model=[1])), "no model settings"),
    "heads as text": (in_start(lambda config: config["model"].update(num_heads="2\n")), "cannot be made"),
    "no record": (lambda r: r.write_text("{}\n"), "not an event of a run record"),
}


class Explosive:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    "case, program",
    [
        *((case, scripts.generate) for case in WEIGHTS),
        ("one more", scripts.export_model),
        ("cut", scripts.export_model),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line_and_nothing_runs(copied, capsys, monkeypatch, case, program):
    spoil, message = WEIGHTS[case]
    spoil(copied)
    monkeypatch.chdir(copied.parent)
    more = ["--to", str(copied.parent / "model")] if program is scripts.export_model else []
    before = sorted(copied.parent.iterdir())
    assert program.main([str(copied), *more]) == Exit.CHECKPOINT
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert sorted(copied.parent.iterdir()) == before


CODE = {
    "a class body": lambda text: text.replace("class RMSNorm(nn.Module):\n", "class RMSNorm(nn.Module):\n    BOOM\n"),
    "beside the model": lambda text: text.replace("class RMSNorm(", "BOOM\n\n\nclass RMSNorm("),
    "a default": lambda text: text.replace("def __init__(self, dim: int)", "def __init__(self, dim: int = BOOM)"),
    "a decorator": lambda text: text.replace("@torch.no_grad()\n    def init", "@BOOM\n    def init"),
    "a block": lambda text: text.replace("class RMSNorm(", "if True:\n    BOOM\n\n\nclass RMSNorm("),
    "no Python": lambda text: text.replace("class RMSNorm(", "class RMSNorm["),
    "no model": lambda text: text.replace("class GPT(", "class OPT("),
    "nested": lambda text: text + "\nx = " + "(" * 5000 + ")" * 5000,
    "NUL": lambda text: text + "\0",
    "a package of the project": lambda text: text.replace("import torch.nn.functional as F", "import aurora.x as F"),
    "a number for text": lambda text: 1,
}


@pytest.mark.parametrize("case", CODE)
def test_code_of_a_stranger_does_not_run(copied, capsys, case):
    boom = f"open({str(copied.parent / 'ran')!r}, 'w').write('x')"

    def change(start, end):
        text = CODE[case](start["sources"]["train_gpt.py"])
        start["sources"]["train_gpt.py"] = text.replace("BOOM", boom) if isinstance(text, str) else text

    change_record(copied, change)
    assert scripts.generate.main([str(copied), "--max-tokens", "1"]) == Exit.CHECKPOINT
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and not (copied.parent / "ran").exists()


def test_comments_and_code_beside_the_model_need_no_trust(copied):
    def change(start, end):
        text = start["sources"]["train_gpt.py"].replace("class RMSNorm(", "# A comment.\nclass RMSNorm(")
        start["sources"]["train_gpt.py"] = text.replace("remaining, cooldown = ", "cooldown, remaining = ")
        del start["sources"]["aurora/trainer/clock.py"]

    change_record(copied, change)
    load(copied)


def test_names_that_stand_for_two_things_are_refused():
    sources = {"train_gpt.py": "from aurora.a import ModelConfig\nclass GPT:\n    x = ModelConfig, F\nF = 1\n"}
    sources["aurora/a.py"] = "F = 2\nclass ModelConfig:\n    f = F\n"
    with pytest.raises(SourceError, match="F is of .* rename one"):
        model_source(sources)
    with pytest.raises(SourceError, match="aurora.a|does not embed|no definition"):
        model_source({"train_gpt.py": sources["train_gpt.py"]})
    sources["aurora/a.py"] = "from .b import G as F\nclass ModelConfig:\n    f = F\n"
    with pytest.raises(SourceError, match="is no definition that can be taken along"):
        model_source(sources)


def test_a_run_is_found_by_path_folder_and_id(copied, tmp_path, monkeypatch):
    (tmp_path / "runs" / "deep").mkdir(parents=True)
    other = Path(shutil.copy(copied, tmp_path / "runs" / "deep"))
    monkeypatch.chdir(tmp_path)
    assert find_record(copied.stem).resolve() == other and find_record("runs").resolve() == other
    shutil.copy(copied, tmp_path / "runs" / "b.jsonl")
    for name, message in ((str(tmp_path), "holds 3 records"), ("x", "no run in runs/"), ("deep.txt", "no run")):
        with pytest.raises(HarnessError, match=message) as error:
            find_record(name)
        assert error.value.reason == Exit.CONFIG
    with pytest.raises(HarnessError, match="is no record, which is a .jsonl file"):
        find_record(str(weights_of(copied)))


# ---- generate ----


def test_samples_follow_the_seed_and_begin_with_the_prompt(runs, capsys):
    record, _ = runs()

    def text(*arguments):
        assert scripts.generate.main([str(record), "--max-tokens", "20", *arguments]) == 0
        return capsys.readouterr().out

    assert text("--prompt", "def ", "--seed", "1") == text("--prompt", "def ", "--seed", "1") != text("--seed", "2")
    assert text("--prompt", "def ").startswith("def ")
    many = text("--n", "2", "--top-k", "5", "--top-p", "0.9", "--temperature", "0.7")
    assert many.startswith("--- 1 of 2\n") and many.count("--- 2 of 2\n") == 1


def test_draws_are_among_those_that_are_asked_for():
    logits, generator = torch.tensor([0.0, 3.0, 2.0, 1.0]), torch.Generator().manual_seed(0)
    draws = lambda **kwargs: {draw(logits, Sampling(**kwargs), generator) for _ in range(200)}  # noqa: E731
    assert draws() == {0, 1, 2, 3} and draws(temperature=0.0) == {1} and draws(top_k=2) == {1, 2}
    shares = logits.softmax(-1).sort(descending=True).values
    assert draws(top_p=float(shares[0]) - 0.01) == {1} and draws(top_p=float(shares[:2].sum()) - 0.01) == {1, 2}
    assert draws(temperature=0.01) == {1} and draws(top_p=1e-9) == {1}


def test_a_sample_ends_where_a_document_does_and_never_draws_padding(runs, monkeypatch):
    trained = load(runs()[0])
    logits = torch.zeros(1, 1, 300)
    logits[..., 299] = 100.0  # no token of 256
    logits[..., 7] = 50.0
    monkeypatch.setattr(trained.model, "logits", lambda tokens: logits.index_fill(2, torch.tensor([0]), len_of(tokens)))
    len_of = lambda tokens: 100.0 if tokens.shape[1] > 4 else 0.0  # noqa: E731
    assert list(sample(trained, [0], Sampling(temperature=0.0))) == [7, 7, 7, 7]


@pytest.mark.parametrize("arguments", ["--n 0", "--temperature -1", "--temperature nan", "--top-k 0", "--top-p 1.5"])
def test_options_out_of_bounds_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        scripts.generate.main(["x", *arguments.split()])
    assert stop.value.code == 2 and "must be" in capsys.readouterr().err


# ---- evaluate ----


@pytest.mark.parametrize("num_context, num_scored", [(1, 1), (1, 64), (1, 65), (1, 200), (10, 60), (100, 5), (1, 128)])
def test_windows_score_each_token_once_with_what_context_fits(num_context, num_scored):
    context, scored = np.arange(num_context), np.arange(num_context, num_context + num_scored)
    found = list(windows(context, scored, 64))
    assert np.array_equal(np.concatenate([piece[-count:] for piece, count in found]), scored)
    assert all(len(piece) == min(65, piece[-1] + 1) and count < len(piece) for piece, count in found)


def test_scores_are_those_of_one_pass_a_token_in_whatever_batch(runs):
    trained, generator = load(runs()[0]), np.random.default_rng(0)
    pairs = [
        (generator.integers(0, 256, a), generator.integers(0, 256, b)) for a, b in ((1, 90), (5, 3), (80, 2), (2, 1))
    ]
    for pair, found in zip(pairs, score(trained, pairs), strict=True):
        expected = []
        for piece, count in windows(*pair, 64):
            logits = trained.model.logits(torch.from_numpy(piece[None, :-1]))[0]
            expected += logits.log_softmax(-1)[range(len(piece) - 1), piece[1:]][-count:].tolist()
        assert found.logprobs == pytest.approx(expected, abs=1e-5)


def test_documents_of_text_are_scored_each_by_itself(runs, tmp_path):
    trained, path = load(runs()[0]), tmp_path / "text.txt"
    path.write_text("for name<|endoftext|>Füße: 你好")
    found = evaluate_text(trained, path)
    assert list(found.sizes) == [8, 14]
    (tmp_path / "a.py").write_text("for name")
    alone = evaluate_text(trained, tmp_path / "a.py")
    assert alone.sums[0] == pytest.approx(found.sums[0], rel=1e-6) and alone.estimate().text(2).count("[") == 0


def test_documents_of_a_shard_go_to_the_next_start(runs, tmp_path):
    trained = load(runs()[0])
    tokens = np.frombuffer(b"\0abc\0de\0f", np.uint8).astype(np.uint16)
    found = evaluate_tokens(trained, tokens, "x")
    assert list(found.sizes) == [3, 3, 2]  # what begins the first is no target
    write_shard(tmp_path / "x.bin", tokens)
    assert list(evaluate_text(trained, tmp_path / "x.bin", 4).sizes) == [3, 1]


def test_the_interval_of_a_ratio_covers_and_that_of_equal_documents_is_none():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        sizes = generator.integers(50, 500, 60)
        found = ratio(sizes * generator.normal(2.0, 0.3, 60), sizes)
        covered += found.low <= 2.0 <= found.high
    assert 0.92 <= covered / 400 <= 0.98
    assert math.isnan(ratio(np.array([2.0, 4.0]), np.array([1, 2])).low)
    ones = Evaluation("tasks", "x", "acc", np.array([0.0, 1, 1, 0, 1]), np.ones(5), {})
    from scipy import stats

    test = stats.ttest_1samp(ones.sums, 0)
    assert ratio(ones.sums, ones.sizes).p == pytest.approx(test.pvalue)
    assert "| - " in run_table(["a", "b"], [ones, ones])


def test_evaluate_compares_runs_and_seeds_and_writes_beside_the_records(runs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    for seed in (0, 1):
        record, _ = runs("train.steps=4", seed=seed) if seed else runs("train.steps=4")
        for path in (record, weights_of(record)):
            shutil.copy(path, folder)
    (tmp_path / "text.txt").write_text(f"{TEXT}<|endoftext|>{TEXT * 2}<|endoftext|>name")
    arguments = [str(folder), "--text", str(tmp_path / "text.txt")]
    assert scripts.evaluate.main(arguments) == 0
    text = capsys.readouterr().out
    assert text.count("| tiny-muon-s") == 2 and "minus the first [95 %]" in text and "p (Welch)" in text
    assert scripts.evaluate.main([*arguments, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["minus_first"] == 0 and second["minus_first"] == pytest.approx(
        second["bits_per_byte"] - first["bits_per_byte"]
    )
    beside = json.loads(evaluations_of(next(folder.glob("*s0*.jsonl"))).read_text())
    assert beside["text"]["text.txt"]["bits_per_byte"] == first["bits_per_byte"]
    weights_of(next(folder.glob("*s1*.jsonl"))).unlink()
    report = ["compare.py", "--report", str(folder), "--evaluate", str(tmp_path / "text.txt")]
    monkeypatch.setattr(sys, "argv", report)
    assert scripts.compare.main() == 0
    text = capsys.readouterr().out
    assert "On text.txt:\n\n| optimizer | n | bits_per_byte [95 %] |" in text
    assert f"| muon      | 1 | {first['bits_per_byte']:.4f}" in text and "is not evaluated: " in text
    monkeypatch.setattr(sys, "argv", [*report, "--json"])
    assert scripts.compare.main() == 0
    evaluation = json.loads(capsys.readouterr().out)["evaluation"]
    assert len(evaluation["runs"]) == len(evaluation["not_evaluated"]) == 1
    evaluations_of(next(folder.glob("*s0*.jsonl"))).write_text("[]")
    assert scripts.evaluate.main([str(folder), *arguments[1:]]) == Exit.CONFIG
    assert "is not what evaluate.py writes (TypeError); move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message", [(b"\xff\xfe\x00", "cannot be read"), (b"", "holds no text"), (b'{"text": 1}', "line 1")]
)
def test_text_that_is_none_is_an_error_of_the_data(runs, tmp_path, capsys, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    if message == "cannot be read":
        (tmp_path / "x.jsonl").rename(tmp_path / "x.md")
    (path,) = tmp_path.iterdir()
    assert scripts.evaluate.main([str(runs()[0]), "--text", str(path)]) == Exit.DATA
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_knows_nothing_scores_chance_within_its_interval(runs, tmp_path):
    trained = load(runs()[0])
    hellaswag_items(tmp_path / "items.jsonl", 100)
    for found in evaluate_hellaswag(trained, str(tmp_path / "items.jsonl")):
        estimate = found.estimate()
        assert estimate.low < 0.25 < estimate.high and len(found.sums) == 100


ITEMS = {"label": ["", 4, None], "endings": [[], ["", "b"], [1]], "ctx_b": [None], "activity_label": [{}]}


@pytest.mark.parametrize("change", [{key: value} for key, values in ITEMS.items() for value in values])
def test_items_that_are_none_are_named(tmp_path, change):
    path = tmp_path / "items.jsonl"
    hellaswag_items(path, 2)
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n")
    with pytest.raises(HarnessError, match="line 2 is no item of HellaSwag") as error:
        read_items(str(path))
    assert error.value.reason == Exit.DATA and read_items(str(path), limit=1)
    path.write_text("{")
    with pytest.raises(HarnessError, match="is no JSON"):
        read_items(str(path))


# ---- export ----


def test_an_export_is_whole_harmless_and_overwrites_nothing(copied, tmp_path, capsys):
    def change(start, end):
        start["env"].update(device_name="<script>x</script> [a](http://b)")
        start["rule"] = {"class": "heavyball.Soap", "packages": {"heavyball": "heavyball 1.2", "own_file": ""}}

    change_record(copied, change)
    out = tmp_path / "models" / "a"
    assert scripts.export_model.main([str(copied), "--to", str(out)]) == 0
    names = {"config.json", "generation_config.json", "model.safetensors", "modeling_speedrun.py", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == names | {"tokenizer_config.json", "README.md", "LICENSE"}
    card = (out / "README.md").read_text()
    assert "<script>" not in card and "](http" not in card and "validation loss" in card
    assert "heavyball.Soap, heavyball 1.2" in card and r"cooldown\_frac" in card
    stored = {name.removeprefix("model.") for name in read_header(out / "model.safetensors")}
    assert stored > set(read_header(weights_of(copied))) and any("rotary" in name for name in stored)
    compile((out / "modeling_speedrun.py").read_text(), "x", "exec")
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert scripts.export_model.main([str(copied), "--to", str(out)]) == Exit.CONFIG
    assert "exists, and nothing is overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").touch()
    assert scripts.export_model.main([str(copied), "--to", str(tmp_path / "file" / "x")]) == Exit.DISK
    assert "cannot be written" in capsys.readouterr().err


def test_commands_of_the_readme_run(copied, tmp_path, monkeypatch, capsys):
    (block,) = (block for block in blocks("README.md", "bash") if "generate.py" in block)
    (tmp_path / "runs").mkdir()
    copied.parent.joinpath("runs/mine").symlink_to(copied.parent, target_is_directory=True)
    for name in ("README.md", "CHANGELOG.md"):
        (tmp_path / name).write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        _, program, *words = shlex.split(line.replace("quick-muon-s0-*.jsonl", copied.name), comments=True)
        more = ["--max-tokens", "9"] if "generate" in program else []
        assert importlib.import_module(program.removesuffix(".py").replace("/", ".")).main([*words, *more]) == 0, line
    assert (tmp_path / "models/muon/config.json").is_file() and capsys.readouterr().out.startswith("def ")


def test_the_project_trains_without_what_these_tools_need():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dependencies = ["torch>=2.9"]' in text and 'train = ["numpy>=1.26"]' in text
    assert importlib.util.find_spec("safetensors") is None or "safetensors" not in text


# ---- other people's libraries ----

HF = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, text = sys.argv[1], torch.tensor(json.loads(sys.argv[2])), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(tokens).logits, folder + "/logits.pt")
    loss = model(tokens, labels=tokens).loss.item()
    written = model.generate(tokens[:1, :5], max_new_tokens=70, do_sample=False)[0].tolist()
ids = tokenizer(text).input_ids
same = tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
print(json.dumps([ids, same, tokenizer("<|endoftext|>").input_ids, loss, written]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["relu2", "swiglu", "edited", "bfloat16", "gpt2"])
def test_transformers_gives_the_logits_of_the_trainers_model(variant, runs, edited, gpt2_files, tmp_path):
    pytest.importorskip("transformers")
    if variant == "gpt2":
        record, model = train_and_keep(write_gpt2_track(tmp_path), tmp_path / "out", *GPT2)
    else:
        record, model = edited if variant == "edited" else runs(*VARIANTS[variant])
    trained, out, tokens = load(record, is_trusted=True), tmp_path / "hf", TOKENS[:, :30]
    export(trained, out)
    text = "It's  3 Füße\n\n\t你好 👍🏽 def f(x): return 12345"
    process = start_process("-c", HF, str(out), json.dumps(tokens.tolist()), text, cwd=tmp_path)
    said, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    ids, is_same_text, start, loss, written = json.loads(said.splitlines()[-1])
    vocabulary = Vocabulary(trained.config["vocab_size"])
    with torch.no_grad():
        expected = model.logits(tokens)
        assert (torch.load(out / "logits.pt") - expected).abs().max() <= (1e-6 if variant != "bfloat16" else 0.05)
        mean = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss == pytest.approx(mean.item(), rel=1e-2 if variant == "bfloat16" else 1e-5)
    assert ids == vocabulary.encode(text).tolist() and is_same_text and start == [vocabulary.document_start]
    prompt, ours = tokens[0, :5].tolist(), []
    for token in sample(trained, prompt, Sampling(temperature=0.0, max_tokens=70)):
        ours.append(token)
    assert variant == "bfloat16" or written[: 5 + len(ours)] == prompt + ours


TASK = """
task: made_up_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: multiple_choice
validation_split: validation
test_split: null
process_docs: !function {utils}.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc, aggregation: mean}}, {{metric: acc_norm, aggregation: mean}}]
"""
TEXTS = """
task: made_up_text
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: loglikelihood_rolling
validation_split: validation
test_split: null
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder of local tasks: 100 items in HellaSwag's form, read by the harness's own code, and some text."""
    lm_eval = pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    shutil.copy(Path(lm_eval.__file__).parent / "tasks/hellaswag/utils.py", folder / "made_up_utils.py")
    hellaswag_items(folder / "items.jsonl", 100)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": TEXT * n}) + "\n" for n in (1, 2, 3)))
    (folder / "items.yaml").write_text(TASK.format(path=folder / "items.jsonl", utils="made_up_utils"))
    (folder / "texts.yaml").write_text(TEXTS.format(path=folder / "texts.jsonl"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bytes", "gpt2"])
def test_scores_are_those_of_the_harness(tasks, runs, gpt2_files, tmp_path, capsys, variant):
    if variant == "gpt2":
        (tmp_path / "gpt2").mkdir()
        record, _ = train_and_keep(write_gpt2_track(tmp_path / "gpt2"), tmp_path / "out", *GPT2, "model.seq_len=64")
    else:
        record, _ = runs()
    names = ["--tasks", "made_up_hellaswag,made_up_text", "--include-path", str(tasks)]
    assert scripts.evaluate.main([str(record), "--hellaswag", str(tasks / "items.jsonl"), *names, "--json"]) == 0
    said = capsys.readouterr().out
    found = {row["name"]: row for row in json.loads(said[said.index("[\n {") :])}
    for figure in ("acc", "acc_norm"):
        own, theirs = found[f"items.jsonl {figure}"], found[f"made_up_hellaswag {figure}"]
        assert own[figure] == theirs[figure] == theirs["harness"] and own["documents"] == theirs["documents"] == 100
    text = evaluate_text(load(record), tasks / "texts.jsonl")
    assert found["made_up_text bits_per_byte"]["harness"] == pytest.approx(text.estimate().value, rel=1e-5)
    assert found["made_up_text bits_per_byte"]["bits_per_byte"] == pytest.approx(text.estimate().value, rel=1e-5)
    assert scripts.evaluate.main([str(record), "--tasks", "no_such_task"]) == Exit.CONFIG
    assert "error: lm_eval cannot run no_such_task" in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_scores_the_export_as_it_scores_the_run(tasks, runs, tmp_path):
    """By its own class for models of transformers."""
    pytest.importorskip("accelerate")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from scripts.models.harness import HarnessModel, evaluate_tasks

    trained = load(runs()[0])
    export(trained, tmp_path / "hf")
    arguments = {"pretrained": str(tmp_path / "hf"), "trust_remote_code": True, "device": "cpu"}
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=["made_up_hellaswag"], bootstrap_iters=0, limit=20,
        task_manager=TaskManager(include_path=str(tasks)),
    )  # fmt: skip
    acc, acc_norm = evaluate_tasks(trained, ["made_up_hellaswag"], str(tasks), None, 20)
    assert acc.estimate().value == theirs["results"]["made_up_hellaswag"]["acc,none"]
    assert acc_norm.estimate().value == theirs["results"]["made_up_hellaswag"]["acc_norm,none"]
    model = HarnessModel(trained)
    assert model.text_until("for ", {"until": ["e"], "max_gen_toks": 40}).count("e") == 0
    assert len(model.text_until("for ", {"until": [], "max_gen_toks": 7}).encode()) <= 21
