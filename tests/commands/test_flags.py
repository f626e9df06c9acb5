"""Command lines: made from fields, checked by dataclasses, named in errors."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import hvit_jax
from hvit_jax import InputError, Reducer
from hvit_jax.commands import flags
from hvit_jax.fields import Options, as_json, from_json, nested, option


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


@dataclass(frozen=True)
class Inner(Options):
    """Options that another record holds."""

    size: int = option(1, "a size", least=1, group="inner things")
    hidden: int = option(2, "no flag of the outer record's")


@dataclass(frozen=True)
class Outer(Options):
    """A command's record."""

    data: str | None = option(None, "what to read", positional=True)
    reducer: Reducer = Reducer()
    inner: Inner = nested(Inner, leave=("hidden",))
    resolution: int | tuple[int, int] | None = option(None, short="-r")
    output: Path | None = option(None)
    files: tuple[Path, ...] = option(())


for record in (Inner, Outer):
    record.__init__ = getattr(record.__init__, "__wrapped__", record.__init__)


def parse(line, method="sample", record=Outer):
    words = ["--method", method, *line.split()]
    return flags.parse(record, words, program="program", description="")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("-c 5", {"count": 5}),
        ("--count=5", {"count": 5}),
        ("--rate 0.25", {"rate": 0.25}),
        ("--rate 1", {"rate": 1.0}),
        ("--rate 1e-3", {"rate": 0.001}),
        ("--flag", {"flag": True}),
        ("--no-flag", {"flag": False}),
        ("--kind cls", {"kind": "cls"}),
        ("--blocks 6,12,18", {"blocks": (6, 12, 18)}),
        ("--blocks=6,12", {"blocks": (6, 12)}),
        ("--blocks 6", {"blocks": (6,)}),
        ("-g 16", {"grid": 16}),
        ("-g 16,8", {"grid": (16, 8)}),
        ("--pair 8,-0.5", {"pair": (8, -0.5)}),
        ("--pair -8,5,3", {"pair": (-8, 5, 3)}),
    ],
)
def test_values(line, expected):
    reducer = parse(line).reducer
    assert reducer == Sample(**expected)
    assert all(type(getattr(reducer, name)) is type(value) for name, value in expected.items())
    assert parse(" ".join(reducer.words()[2:])).reducer == reducer


def test_records_in_records():
    found = parse("pictures -r 6,7 --size 3 --output x.json -g 4,5")
    assert found == Outer(
        data="pictures",
        reducer=Sample(grid=(4, 5)),
        inner=Inner(size=3),
        resolution=(6, 7),
        output=Path("x.json"),
    )
    assert flags.parse(Outer, found.words(), program="program", description="") == found
    assert from_json(Outer, as_json(found), reducer=found.reducer) == found
    with pytest.raises(InputError, match="unknown option --hidden"):
        parse("--hidden 3")
    with pytest.raises(InputError, match="--size must be at least 1, got 0"):
        parse("--size 0")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-c five", "sample: count must be a whole number, got 'five'"),
        ("-c 2.0", "sample: count must be a whole number, got 2.0"),
        ("-c", "expected one argument"),
        ("--blocks", "expected one argument"),
        ("--blocks six", "sample: blocks must be a list of whole numbers, got"),
        ("--blocks 1,2.5", "sample: blocks must be a list of whole numbers, got"),
        ("-g 1,2,3", "sample: grid must be"),
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
        ("--pair 4,nan", r"sample: pair must be .*, got \(4, 'nan'\)"),
        ("--pair 4,-inf pictures", r"sample: pair must be .*, got \(4, '-inf'\)"),
        ("-g 4 5", "'5' would be read as DATA; lists are written with commas, such as 6,12,18"),
        ("one -g 4 5", "unexpected argument '5': lists are written with commas, such as 6,12,18"),
        ("one --pair 4 x", r"unexpected argument 'x' \(see "),
        ("one --kind=cls x", r"unexpected argument 'x' \(see "),
        ("one --files a b", "unexpected argument 'b': lists are written with commas, without"),
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
    assert parse("-c " + "9" * 400).reducer.options()["count"] == 10**400 - 1


def test_unknown_method():
    with pytest.raises(InputError, match="unknown method 'sampel', did you mean 'sample'"):
        parse("", method="sampel")


def test_default_method():
    found = flags.parse(Outer, [], program="program", description="")
    assert found == Outer() and type(found.reducer) is Reducer


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
        "--flag, --no-flag a switch",
        "--kind {mean,cls}",
        "whole numbers, or two of a kind (default: 1,2)",
        "--blocks N[,N...] a list of blocks",
        "-g N[,N], --grid N[,N] one or two",
        "inner things: --size N a size (default: 1)",
    ):
        assert text in out


def test_options_from_a_file_yield_to_the_command_line(tmp_path):
    path = tmp_path / "options.json"
    path.write_text('{"method": "evit", "args": {"keep_rate": 0.5, "drop_locations": [1, 2]}}')
    reducer = parse(f"--method-args {path}", "evit").reducer
    assert reducer.options()["drop_locations"] == [1, 2]
    assert reducer.options()["keep_rate"] == 0.5
    reducer = parse(f"--method-args {path} --keep-rate 0.9", "evit").reducer
    assert reducer.options()["keep_rate"] == 0.9
    with pytest.raises(InputError, match="method 'evit', not 'dense'; give --method evit"):
        parse(f"--method-args {path}", "dense")


def test_parser_reports_usage_as_input_error(capsys):
    parser = flags.ArgumentParser(prog="tool")
    parser.add_argument("--size", type=int)
    assert parser.parse_args(["--size", "3"]).size == 3
    for arguments, part in [(["--size", "x"], "invalid int"), (["--si", "3"], "unrecognized")]:
        with pytest.raises(InputError, match=f"{part}.*see tool --help"):
            parser.parse_args(arguments)
    assert capsys.readouterr() == ("", "")
