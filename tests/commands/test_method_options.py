"""Method options on command lines: made from fields, checked by dataclasses, named in errors."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hvit_jax.commands.method_options import numbers, parse_with_method
from hypothesis import given
from hypothesis import strategies as st

import hvit_jax
from hvit_jax import InputError, Reducer
from hvit_jax.fields import option
from hvit_jax.system.run import ArgumentParser


@dataclass(frozen=True)
class Sample(Reducer):
    """A method with an option of every kind."""

    name: ClassVar[str] = "sample"

    count: int = option(3, "a count, 100% sure", short="-c")
    rate: float | None = option(None, "a rate")
    flag: bool = option(False, "a switch")
    kind: str = option("mean", "a kind", choices=("mean", "cls"))
    blocks: tuple[int, ...] | None = option(None, "a list of blocks")
    grid: int | tuple[int, int] | None = option(None, "one or two", short="-g")
    pair: tuple[int, ...] | tuple[int, float] = option((1, 2), "whole numbers, or two of a kind")


# Only what the tests' own import hook added is taken off; see conftest.
Sample.__init__ = getattr(Sample.__init__, "__wrapped__", Sample.__init__)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(hvit_jax.REDUCERS, "sample", Sample)


def parse(line, method="sample"):
    parser = ArgumentParser(prog="program")
    parser.add_argument("data", nargs="?")
    parser.add_argument("-r", "--resolution", type=numbers)
    words = ["--method", method, *line.split()]
    return parse_with_method(parser, words, list_flags=("-r", "--resolution"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("-c 5", {"count": 5}),
        ("--count=5", {"count": 5}),
        ("--rate 0.25", {"rate": 0.25}),
        ("--rate 1", {"rate": 1}),
        ("--rate 1e-3", {"rate": 0.001}),
        ("--flag", {"flag": True}),
        ("--no-flag", {"flag": False}),
        ("--kind cls", {"kind": "cls"}),
        ("--blocks 6 12 18", {"blocks": (6, 12, 18)}),
        ("--blocks=6 12", {"blocks": (6, 12)}),
        ("--blocks 6,12,18", {"blocks": (6, 12, 18)}),
        ("--blocks 6", {"blocks": (6,)}),
        ("-g 16", {"grid": 16}),
        ("-g 16 8", {"grid": (16, 8)}),
        ("--pair 8 -0.5", {"pair": (8, -0.5)}),
        ("--pair -8 5 3", {"pair": (-8, 5, 3)}),
    ],
)
def test_values(line, expected):
    _, reducer = parse(line)
    assert reducer == Sample(**expected)
    wanted = dataclasses.replace(Sample(), **expected)
    assert all(type(getattr(reducer, name)) is type(value) for name, value in expected.items())
    assert reducer == wanted


def test_paths_may_follow_numbers():
    for line in (
        "-g 4 5 pictures",
        "pictures -g 4 5",
        "-g 4 5 -r 6 7 pictures",
        "-g 4 5 -- pictures",
    ):
        options, reducer = parse(line)
        assert options.data == "pictures" and reducer.grid == (4, 5)
    assert options.resolution is None
    assert parse("-r 6 7 pictures")[0].resolution == (6, 7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-c five", "sample: count must be a whole number, got 'five'"),
        ("-c 2.0", "sample: count must be a whole number, got 2.0"),
        ("-c", "expected one argument"),
        ("--blocks", "expected one argument"),
        ("--blocks six", "sample: blocks must be a list of whole numbers, got"),
        ("--blocks 1 2.5", "sample: blocks must be a list of whole numbers, got"),
        ("-g 1 2 3", "sample: grid must be"),
        ("--kind max", "sample: kind must be one of mean, cls: 'max'"),
        ("--rate nan", "sample: rate must be a number, got 'nan'"),
        ("--rate 1e999", "sample: rate must be a number, got inf"),
        ("--coun 5", r"unknown option --coun, did you mean --count\?"),
        ("--num-clusters 4", "sample has no option --num-clusters; it is one of hourglass"),
        ("-n 4", "sample has no option -n; it is one of hourglass"),
        ("-n4", "sample has no option -n; it is one of hourglass"),
        ("--xyzzy", "unknown option --xyzzy "),
        ("--rate " + "9" * 400, "sample: rate must be a number, got 99"),
        ("--pair nan", r"sample: pair must be .*, got \('nan',\)"),
        ("--pair 4 nan", r"sample: pair must be .*, got \(4, 'nan'\)"),
        ("--pair 4 -inf pictures", r"sample: pair must be .*, got \(4, '-inf'\)"),
        ("one --pair 4 x", r"unexpected argument 'x' \(--pair takes numbers, so 'x' behind them"),
        ("one --pair=4 x", r"unexpected argument 'x' \(--pair takes numbers, so 'x' behind them"),
        ("one --pair=4,5 x", r"unexpected argument 'x' \(--pair takes numbers, so 'x' behind them"),
        ("one --kind=cls x", r"unexpected argument 'x' \(see "),
        ("one two", "unexpected argument 'two'"),
    ],
)
def test_mistakes(line, message):
    with pytest.raises(InputError, match=message):
        parse(line)


def test_options_of_another_method_name_their_owner():
    with pytest.raises(InputError, match="dense has no option --no-flag; it is one of sample"):
        parse("--no-flag", method="dense")


def test_a_whole_number_may_have_any_size():
    assert parse("-c " + "9" * 400)[1].options()["count"] == 10**400 - 1


def test_unknown_method():
    with pytest.raises(InputError, match="unknown method 'sampel', did you mean 'sample'"):
        parse("", method="sampel")


def test_default_method():
    _, reducer = parse_with_method(ArgumentParser(prog="program"), [])
    assert type(reducer) is Reducer
    _, reducer = parse_with_method(ArgumentParser(prog="program"), ["-c", "1"], default="sample")
    assert reducer == Sample(count=1)


@pytest.mark.parametrize("method", list(hvit_jax.REDUCERS))
def test_every_method_has_help(method, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help", method=method)
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(hvit_jax.REDUCERS[method]):
        assert "--" + field.name.replace("_", "-") in out


def test_help_shows_defaults_and_choices(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "-c N, --count N a count, 100% sure (default: 3)",
        "--flag, --no-flag a switch (default: False)",
        "--kind {mean,cls}",
        "whole numbers, or two of a kind (default: 1 2)",
        "--blocks N [N ...] a list of blocks",
    ):
        assert text in out


@given(st.lists(st.integers(-999, 999) | st.floats(-99, 99), min_size=1, max_size=5))
def test_numbers_are_read_back(values):
    found = numbers(" ".join(map(repr, values)))
    assert found == (values[0] if len(values) == 1 else tuple(values))


def test_options_from_a_file_yield_to_the_command_line(tmp_path):
    path = tmp_path / "options.json"
    path.write_text('{"method": "evit", "args": {"keep_rate": 0.5, "drop_locations": [1, 2]}}')
    words = ["--method", "evit", "--method-args", str(path)]
    _, reducer = parse_with_method(ArgumentParser(prog="program"), words)
    assert reducer.options()["drop_locations"] == [1, 2]
    assert reducer.options()["keep_rate"] == 0.5
    _, reducer = parse_with_method(ArgumentParser(prog="program"), [*words, "--keep-rate", "0.9"])
    assert reducer.options()["keep_rate"] == 0.9
    with pytest.raises(InputError, match="is for the method 'evit', not 'dense'"):
        parse_with_method(ArgumentParser(prog="program"), words[2:])
