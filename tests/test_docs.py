"""The documents: their commands parse, their keys, files and links exist, their code runs, the README stays short."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import itertools
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import aurora
from aurora.config import load_config, parse_config
from aurora.trainer.optimizers import checked_hparams
from scripts import config_table
from scripts.analysis.tuning import read_space
from tests.conftest import BOARD_RULES, OPTIMIZERS, ROOT

FOLDERS = (".", "aurora/fast", "aurora/optim", "aurora/trainer", "configs", "data", "scripts")
DOCUMENTS = [f"{folder}/README.md".removeprefix("./") for folder in FOLDERS]
DOCUMENTS += [name for name in ("CONTRIBUTING.md",) if (ROOT / name).is_file()]
GENERATED = ["results/README.md", "results/FINDINGS.md"]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Programs whose arguments the project does not define.
FOREIGN = {"cd", "git", "mypy", "pytest", "ruff", "sbatch", "source", "tar"}
README_WORDS, README_SENTENCE_WORDS = 1670, 17


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(document), re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    """Every command of the bash blocks, and those that stand in a sentence."""
    lines = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", read(document), flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [line for line in lines if line.strip() and not line.startswith("#")] + [
        span for span in spans if re.match(r"(\w+=\S+ )*(python|bash|torchrun|pip) \S", span)
    ]


@pytest.fixture(scope="module")
def tracks(tmp_path_factory):
    """The track and the search space of a document, with the tables that the README and it add to quick.toml."""
    folder = tmp_path_factory.mktemp("tracks")

    def make(document):
        tables = list(dict.fromkeys([*blocks("README.md", "toml"), *blocks(document, "toml")]))
        tables = [table for table in tables if not table.startswith("[train]")]  # in the place of the track's own
        track, space = folder / "quick.toml", folder / "space.toml"
        for path, source, is_own in ((track, "configs/quick.toml", True), (space, "configs/tuning/quick.toml", False)):
            own = [table for table in tables if table.startswith("[optimizer.") == is_own]
            path.write_text("\n".join([read(source), *own]))
        return track, read_space(space)

    return make


class Parsed(Exception):
    """The arguments that a script would have gone on with."""


def parse(module: str, words: list[str], monkeypatch) -> argparse.Namespace:
    """What a script's own parser makes of these words. Raises AssertionError with its message when it refuses them."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args, **kwargs):
        raise Parsed(parse_args(parser, *args, **kwargs))

    said = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [module, *words])
        try:
            importlib.import_module(module).main()
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit:
            pass
    raise AssertionError(said.getvalue())


def check_settings(args: argparse.Namespace, track: Path, space) -> None:
    """Tracks, optimizers and --set keys that a command names exist."""
    config = getattr(args, "config", None)
    if config is None:
        return
    assert (ROOT / config).is_file(), config
    names = getattr(args, "optimizers", None) or [getattr(args, "optimizer", None) or "muon"]
    if hasattr(args, "trials"):
        assert set(names) <= set(space.knobs)
    for name in names:
        grids = itertools.chain(*(grid[:1] for grid in getattr(args, "grid", [])))
        grid = [f"{key.replace('optimizer.', f'optimizer.{name}.')}={value}" for key, value in grids]
        path = track if Path(config).name == "quick.toml" else ROOT / config
        loaded = load_config(path, name, [*getattr(args, "overrides", []), *grid])
        if name in (*OPTIMIZERS, *BOARD_RULES):
            checked_hparams(loaded)


def check_command(text: str, track: Path, space, monkeypatch) -> None:
    words = shlex.split(text.replace("configs/NAME.toml", "configs/quick.toml"), comments=True)
    words = list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), words))
    words = list(itertools.takewhile(lambda word: word != ">", words))
    for word in words:
        if word.startswith(("results/", "configs/", "tests/")):
            assert list(ROOT.glob(word)), word
    program, words = Path(words[0]).name, words[1:]
    if program == "torchrun":
        words = list(itertools.dropwhile(lambda word: word.startswith("--"), words))
        program = "python"
    if program == "pip":
        extras = re.search(r"\[([\w,]+)\]", text)
        assert not extras or set(extras[1].split(",")) <= set(EXTRAS), f"pyproject.toml has {', '.join(EXTRAS)}"
    elif program == "bash":
        assert (ROOT / words[0]).is_file(), words[0]
        module = {"scripts/quickstart.sh": "scripts.compare", "scripts/launch.sh": "train_gpt"}.get(words[0])
        if module:
            check_settings(parse(module, words[1:], monkeypatch), track, space)
    elif program == "python" and words[0] == "-m":
        assert not words[1].startswith("aurora") or importlib.util.find_spec(words[1]), text
    elif program == "python" and words[0] == "-c":
        compile(words[1], text, "exec")
    elif program == "python":
        assert (ROOT / words[0]).is_file(), words[0]
        module = words[0].removesuffix(".py").replace("/", ".")
        if len(words) > 1 or module != "train_gpt":
            check_settings(parse(module, words[1:], monkeypatch), track, space)
    else:
        assert program in FOREIGN, f"{text}: no rule for {program}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_one_that_its_program_takes(document, tracks, monkeypatch):
    track, space = tracks(document)
    for text in commands(document):
        try:
            check_command(text, track, space, monkeypatch)
        except Exception as error:
            raise AssertionError(f"{document}: {text}: {error}") from error


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_key_that_a_document_sets_exists(document):
    text = re.sub(r"\s+", " ", read(document))
    for key, value in re.findall(r"--set `?([a-z_.]+)=([^\s`|)]+)", text):
        if key.split(".")[1] not in ("signum", "key"):
            load_config(ROOT / "configs/quick.toml", "muon", [f"{key}={value if value != 'N' else 1}"])


def slugs(document: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", read(document), flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)", text, re.MULTILINE)]
    names = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return {f"{name}-{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)}


@pytest.mark.parametrize("document", [*DOCUMENTS, *GENERATED])
def test_every_link_leads_somewhere(document):
    text, folder = read(document), (ROOT / document).parent
    for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (folder / path).resolve() if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in slugs(target.relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_are_python(document):
    for block in blocks(document, "python"):
        compile(block, document, "exec")


def test_optimizer_of_the_page_takes_a_step():
    (block,) = (block for block in blocks("aurora/optim/README.md", "python") if "import Aurora, param_groups" in block)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    names: dict = {"model": model}
    exec(block, names)
    model(torch.ones(1, 4)).sum().backward()
    before = model[0].weight.clone()
    names["optimizer"].step()
    assert not torch.equal(before, model[0].weight)


def test_table_of_the_readme_is_muons_but_for_lr():
    (block,) = blocks("README.md", "toml")
    own = tomllib.loads(block)["optimizer"]["signum"]
    muon = tomllib.loads(read("configs/quick.toml"))["optimizer"]["muon"]
    assert set(aurora.REQUIRED_HPARAMS) <= set(own) and own.keys() <= muon.keys()
    assert {key: value for key, value in own.items() if muon[key] != value}.keys() == {"lr"}


def test_search_space_of_the_scripts_page_fits_the_readmes_table(tracks):
    track, space = tracks("scripts/README.md")
    keys = {key for knob in space.knobs["signum"] for key in knob.keys}
    assert keys <= load_config(track, "signum").hparams.keys()


def test_schedule_of_the_configs_page_is_one_that_a_run_takes():
    (block,) = blocks("configs/README.md", "toml")
    track = read("configs/gpt2_small.toml")
    text = re.sub(r"^\[schedule\]\n(.+\n)+", block.partition("\n\n")[2] + "\n", track, flags=re.MULTILINE)
    config = parse_config(text, Path("example.toml"), "muon")
    assert config.train.steps == tomllib.loads(block)["train"]["steps"] and config.schedule.planned_steps == 3300
    assert config.schedule.embed and config.schedule.momentum and config.schedule.cooldown_frac is None


def sentences(text: str) -> list[str]:
    """The sentences of a page's paragraphs and lists, without code, tables, headings and pictures."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(#|\||!\[).*", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=- |\d+\. )", text)
    found = (sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?])\)?\s+", paragraph))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def test_readme_is_short():
    text = read("README.md")
    assert len(text.split()) <= README_WORDS
    lengths = [len(sentence.split()) for sentence in sentences(text)]
    assert sum(lengths) / len(lengths) <= README_SENTENCE_WORDS


def test_page_of_config_keys_is_what_the_code_gives():
    assert (*OPTIMIZERS, *BOARD_RULES) == config_table.RULES
    assert config_table.main(["--check"]) == 0
