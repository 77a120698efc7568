"""A record as a public-style text log: source that runs by itself, a line of =, then the lines of the run."""

from pathlib import Path, PurePosixPath
from typing import Any

from aurora.config import ROOT
from aurora.trainer.events import STORE, RecordError, stored_source
from aurora.trainer.public import plain_line
from aurora.trainer.record import Run, read_record
from scripts.analysis.text import plain

SEPARATOR = "=" * 100
# Unpacks the sources into a folder and trains as the record did; data is looked for where the command is given.
LAUNCHER = """\
# Trains one run again: python THIS_FILE [more arguments of train_gpt.py, such as --out DIR]
import json, os, pathlib, subprocess, sys, tempfile

SOURCES = {sources!r}
CONFIG, ARGUMENTS, DATA = {config!r}, {arguments!r}, {data!r}
with tempfile.TemporaryDirectory() as folder:
    for name, text in SOURCES.items():
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    script, track = (os.path.join(folder, name) for name in ("train_gpt.py", CONFIG))
    command = [sys.executable, script, "--config", track, *ARGUMENTS]
    for name, files in DATA.items():
        command += ["--set", f"data.{{name}}={{json.dumps(os.path.abspath(files))}}"]
    environment = os.environ | {{"SPEEDRUN_FOLDER": os.path.join(folder, "external")}}
    code = subprocess.run([*command, *sys.argv[1:]], env=environment).returncode
sys.exit(code)
"""
# Records of code 1aef6f23 import these and do not embed them. These are their texts of the commit that they name.
LACKING = {
    "results/momentum.py": "c592320d84a6703157e2c0d804f1c92b91ac4dd53d12461439157381a86485f5",
    "results/tracking.py": "5a1db90e8bbf04a35ec63e5eebd44248840b6b5c03a58c21735470ee4bbac3a4",
}


def export_record(path: Path, out: Path) -> None:
    """Write the record as a log.

    Raises:
        ValueError: no record, one that does not embed its sources, or out exists.
        OSError: out cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a new file with --out")
    run = read_record(path)
    start = run.start
    sources = whole_sources(run)
    source = LAUNCHER.format(
        sources=sources,
        config=next(name for name in sources if name.endswith(".toml")),
        arguments=["--optimizer", optimizer_of(start), "--seed", str(start["seed"]), *overrides(start["argv"])],
        data={name: str(start["config"]["data"][name]) for name in ("train", "val")},
    )
    steps = start["config"]["train"]["steps"]
    machine = plain_line(f"torch {start['env']['torch']} on {start['env']['device_name']}")
    lines = [source, SEPARATOR, machine, SEPARATOR]
    for validation in run.validations:
        average = f"{1e3 * validation.train_time_s / validation.step:.2f}" if validation.step else "nan"
        lines.append(
            f"step:{validation.step}/{steps} val_loss:{validation.val_loss!r} "
            f"train_time:{validation.train_time_s:.6f}s "
            f"step_avg:{average}ms"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def whole_sources(run: Run) -> dict[str, str]:
    """The embedded sources by name, and the old modules that they import and lack.

    Raises:
        RecordError: they are not all there, or a name leads out of the folder.
    """
    sources = run.start["sources"]
    if strange := [name for name, text in sources.items() if not is_inside(name) or not isinstance(text, str)]:
        raise RecordError(f"{run.path}: its source {plain(strange[0])!r} leads out of its folder or is no text")
    if "train_gpt.py" not in sources or sum(name.endswith(".toml") for name in sources) != 1:
        raise RecordError(f"{run.path} does not embed the sources and the config of its run")
    whole = dict(sources)
    for name, digest in LACKING.items():
        if f"from {name.removesuffix('.py').replace('/', '.')} import" in sources["train_gpt.py"] and name not in whole:
            text = stored_source(ROOT / "results", digest)
            if text is None:
                raise RecordError(f"{run.path} imports {name}, of which results/{STORE}/ lacks the text")
            whole[name] = text
    return whole


def optimizer_of(start: dict[str, Any]) -> str:
    """What --optimizer said: a name, or module:Class, which may have no table."""
    rule = start["config"].get("rule", start["optimizer"])
    argv = [word.removeprefix("--optimizer=") for word in start["argv"]]
    return rule if rule in argv else start["optimizer"]


def is_inside(name: str) -> bool:
    """Whether this name of a file stays in the folder that it is written to."""
    path = PurePosixPath(name)
    is_plain = name.isprintable() and "\\" not in name and ":" not in name
    return bool(path.parts) and is_plain and not path.is_absolute() and ".." not in path.parts


def overrides(argv: list[str]) -> list[str]:
    """The --set options of a command line."""
    values = [value for option, value in zip(argv, argv[1:], strict=False) if option == "--set"]
    values += [argument.removeprefix("--set=") for argument in argv if argument.startswith("--set=")]
    return [part for value in values for part in ("--set", value)]
