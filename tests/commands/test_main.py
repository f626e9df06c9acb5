"""The program hvit: what it lists, and where its commands are."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvit_jax.commands import completion
from hvit_jax.commands.flags import options_of
from hvit_jax.commands.main import COMMANDS, main, records
from hvit_jax.version import __version__

ROOT = Path(__file__).parents[2]


def test_usage_lists_all_commands(capsys):
    for words in ([], ["--help"]):
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)


def test_versions(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hvit_jax {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_version_and_help(command, capsys):
    for words, start in (("--version", f"hvit_jax {__version__}"), ("--help", "usage: hvit")):
        with pytest.raises(SystemExit) as ended:
            main([command, words])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert out.startswith(start) and (words == "--version" or f"hvit {command} " in out)


def test_unknown_commands_name_the_nearest(capsys):
    assert main(["evla"]) == 2
    assert "unknown command 'evla', did you mean 'eval'?" in capsys.readouterr().err


def test_unknown_options_name_the_nearest(capsys):
    assert main(["--verison"]) == 2
    assert "unknown option '--verison', did you mean '--version'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_output_is_short_o(command):
    options = {field.name: field.metadata for field, _ in options_of(records()[command][1])}
    assert options.get("output", {}).get("short", "-o") == "-o"


def test_the_same_as_python_m_hvit_jax():
    done = subprocess.run(
        [sys.executable, "-m", "hvit_jax", "export", "--batch", "0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stderr.startswith("hvit export: ")


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (("-m", "hvit_jax", "eval"), "hvit eval"),
        (("eval.py",), "hvit eval"),
        (("profile.py",), "hvit profile"),
        (("-m", "convert", "a", "b"), "hvit convert"),
    ],
)
def test_ctrl_c_while_libraries_load_ends_in_one_line(words, program):
    command = [sys.executable, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, f"{program}: interrupted\n")


def test_completion_has_the_options_of_all_methods():
    pytest.importorskip("shtab", reason="needs shtab (the extra completion)")
    script = completion.completion("bash", records())
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    script += """
completed() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_hvit; echo ${COMPREPLY[@]}; }
completed hvit ev
completed hvit export --weights ""
completed hvit eval --keep-r
completed hvit visualize --method tom
"""
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["eval", "beside inside", "--keep-rate", "tome tome_dense"]


def test_completion_for_another_shell(capsys):
    pytest.importorskip("shtab", reason="needs shtab (the extra completion)")
    assert main(["--print-completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef hvit")
    assert main(["--print-completion", "zhs"]) == 2
    assert "unknown shell 'zhs', did you mean 'zsh'?" in capsys.readouterr().err


def test_completion_without_shtab(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "pip install 'hvit-jax[completion]'" in capsys.readouterr().err
