"""Thousands of broken configs, each answered in time, by a dry run's report or by one line."""

import random
import time

import pytest

from tests.conftest import OPTIMIZERS, ROOT, often, train_here

WORDS = ["", "a", "auto", "on", "float8", "bfloat16", "swiglu", "../*", "[", "\\u0000", "é" * 300, "x" * 100_000]
NUMBERS = [0, 1, -1, 2, 3, 7, 16, 64, 1000, 65_536, 10**5, 10**6, 10**7, 10**8, 256, 2**31, 2**53, 2**63, 2**64, 10**30]
FLOATS = [0.0, -0.0, 0.5, 0.9999999, 1.0, 1.5, 1e-30, 5e-324, 1e9, 1e30, 1e308, -1e308]
ODD = ["nan", "inf", "-inf", "true", "1" * 400, "1" * 5000, "-" + "9" * 400, "1e400", "0." + "1" * 400, "1979-05-27"]
ODD += ["0x" + "f" * 5000, "[0x" + "f" * 5000 + "]"]
TABLES = ["[]", "[0.9, 0.95]", "[0.9, 1e400]", f"[{10**400}, 1]", "[" * 3000 + "]" * 3000, "{}", "{a = 1}", "[[1]]"]
VALUES = [*map(repr, NUMBERS), *map(repr, FLOATS), *ODD, *TABLES, *(f'"{word}"' for word in WORDS)]


def mutated(text: str, r: random.Random) -> bytes:
    """The text of a track with one to three faults, most of them another value of a key."""
    lines = text.splitlines()
    for _ in range(r.randint(1, 3)):
        i = r.choice([i for i, line in enumerate(lines) if " = " in line] or [0])
        key = lines[i].partition(" = ")[0]
        kind = r.random()
        if kind < 0.8:
            lines[i] = f"{key} = {r.choice(VALUES)}"
        elif kind < 0.85:
            del lines[i]
        elif kind < 0.9:
            odd = [lines[i], f"{key}x = 1", "[[model]]", "[train.steps]", "]"]
            lines.insert(r.randrange(len(lines)), r.choice(odd))
        else:
            content = bytearray("\n".join(lines).encode())
            for _ in range(r.randint(1, 5)):
                content[r.randrange(len(content))] = r.randrange(256)
            return bytes(content[: r.randrange(len(content))] if r.random() < 0.3 else content)
    content = "\n".join(lines).encode()
    return r.choice([b""] * 20 + [b"\xef\xbb\xbf", b"\xff\xfe"]) + content


def piece(r: random.Random) -> str:
    """A piece of a schedule, mostly one that a track may have."""
    share = [*["0.0", "0.3", "1.0", "1", "0"] * 3, r.choice(VALUES)]
    until = ["0.2", "0.6", "1.0", "3", "7", "12"]
    words = [f"until = {r.choice([*until * 4, r.choice(VALUES)])}"] * (r.random() < 0.95)
    words += [f"{key} = {r.choice(share)}" for key in ("from", "to") if r.random() < 0.4]
    if r.random() < 0.4:
        shape = r.choice([*['"cosine"', '"sqrt"', '"linear"'] * 4, '"power"\x00', r.choice(VALUES)])
        words.append(f"shape = {shape.replace(chr(0), f', exponent = {r.choice([*share, 2, 1.5])}')}")
    words += [f"{r.choice(['untill', 'exponent', 'x'])} = {r.choice(VALUES)}"] * (r.random() < 0.03)
    return f"{{{', '.join(words)}}}"


def pieces(r: random.Random) -> str:
    if r.random() < 0.05:
        return r.choice(VALUES)
    return f"[{', '.join(piece(r) for _ in range(r.choice([1, 1, 1, 2, 2, 3, 70 if r.random() < 0.1 else 1])))}]"


def schedules(r: random.Random) -> str:
    """Lines of a table of schedules."""
    keys = ["lr", "weight_decay", "momentum", r.choice(["embed", "head", "matrix", "vector", "lrs"])]
    own = [key for key in keys if r.random() < 0.3]
    lines = [f"{key} = {pieces(r) if key in keys[:3] else f'{{{r.choice(keys)} = {pieces(r)}}}'}" for key in own]
    return "\n".join(
        lines + [f"planned_steps = {r.choice(['30', '40', '400', r.choice(VALUES)])}"] * (r.random() < 0.2)
    )


def with_schedules(text: str, r: random.Random) -> bytes:
    """A track with odd schedules, of its own and of each optimizer."""
    head, _, tail = text.partition("cooldown_frac")
    short = f"cooldown_frac{tail.partition('[')[0]}" if r.random() < 0.6 else ""
    body = f"{head}{schedules(r)}\n{short}\n[{tail.partition('[')[2]}\n"
    own = [f"[optimizer.{name}.schedule]\n{schedules(r)}\n" for name in OPTIMIZERS if r.random() < 0.5]
    return (body + "".join(own)).encode()


@pytest.mark.parametrize(
    "change, count",
    [(mutated, 120), (with_schedules, 80), often((mutated, 5000), False), often((with_schedules, 5000), False)],
)
def test_every_broken_config_is_answered_in_a_line_and_in_time(tiny_track, tmp_path, capsys, change, count):
    r, path, answered = random.Random(count), tmp_path / "mutated.toml", set()
    tracks = [tiny_track.read_text(), (ROOT / "configs" / "quick.toml").read_text()]
    for number in range(count):
        content = change(r.choice(tracks), r)
        path.write_bytes(content)
        begin_s = time.monotonic()
        try:
            code = train_here(path, tmp_path / "out", "--dry-run", "--optimizer", r.choice(OPTIMIZERS))
        except Exception as error:
            (tmp_path / f"{number}.toml").write_bytes(content)
            raise AssertionError(f"{tmp_path}/{number}.toml") from error
        spent_s = time.monotonic() - begin_s
        said = capsys.readouterr()
        assert code in (0, 2), (number, code, content)
        assert (code == 0) == (not said.err) and said.err.count("\n") <= 1 and len(said.err) < 2000, content
        assert spent_s < 2, (number, spent_s, content)
        answered.add(code)
    assert answered == {0, 2}


HUGE = [f"{key}={value}" for key in ("lr", "aux_eps", "aux_weight_decay", "embed_lr") for value in ("1e300", "1e13")]
HUGE += [f"{key}={10**400}" for key in ("lr", "warmup_steps", "balance_steps")] + [
    "balance_steps=10001",
    "aux_eps=1e400",
]


@pytest.mark.parametrize("setting", HUGE)
def test_numbers_of_an_optimizer_that_no_rule_can_mean_are_named(tiny_track, tmp_path, capsys, setting):
    assert train_here(tiny_track, tmp_path, "--dry-run", "--set", f"optimizer.aurora.{setting}") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: optimizer.aurora.{setting.partition('=')[0]} must be ")
    assert said.count("\n") == 1 and len(said) < 200
