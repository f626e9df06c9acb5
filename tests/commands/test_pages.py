"""README and docs: what they link to and name exists, their commands parse, their snippets run.

A snippet that cannot run here has a line `<!-- not run: reason -->` before it.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvit_jax.commands.flags import parse
from hvit_jax.commands.main import records

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
GUIDE = "docs/adding-a-reducer.md"  # Followed by tests/reducers/test_adding_a_method.py.
# Whatever is in a folder of the repository is named by its path from there.
FOLDERS = ("benchmarks", "convert", "docs", "examples", "hvit_jax", "tests", ".ci")
# How each command is written, and its name in `hvit`.
PROGRAMS = {
    "python eval.py": "eval",
    "python profile.py": "profile",
    "python -m convert": "convert",
    **{f"hvit {name}": name for name in records()},
}
_SNIPPET = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """A block of code in a page, and why it is not run, if it is not."""

    language: str
    code: str
    reason: str | None


def snippets(page):
    found = _SNIPPET.finditer((ROOT / page).read_text())
    return [Snippet(each["language"], each["code"], each["reason"]) for each in found]


def runnable(page, language):
    chosen = [each for each in snippets(page) if each.language == language and not each.reason]
    return "\n".join(each.code for each in chosen)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    files = [each.partition("#")[0] for each in targets if "://" not in each]
    missing = [each for each in files if each and not (ROOT / page).parent.joinpath(each).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    words = re.findall(r"[\w.*/-]+", (ROOT / page).read_text())
    named = {word.strip("./") if word[0] != "." else word.rstrip("./") for word in words}
    named = {word for word in named if word.partition("/")[0] in FOLDERS and "/" in word}
    new = {"hvit_jax/reducers/pooling.py"} if page == GUIDE else set()
    assert not [word for word in named - new if not list(ROOT.glob(word))]


def commands(page):
    """List the command lines of a page: the program's name in `hvit`, and its words."""
    for snippet in snippets(page):
        for line in snippet.code.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("srun ")
            for program, name in PROGRAMS.items():
                if snippet.language == "bash" and f"{line} ".startswith(f"{program} "):
                    yield name, shlex.split(line.removeprefix(program), comments=True)


@pytest.mark.parametrize("page", [page for page in PAGES if page != GUIDE])
def test_commands_parse(page, tmp_path, monkeypatch):
    """Those that are not run, too: no option has another name by now, or is out of range."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ats.json").write_text('{"method": "ats", "args": {"max_tokens": 80}}')
    for name, words in commands(page):
        if not any("$" in word for word in words):
            parse(records()[name][1], words, f"hvit {name}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_named_exist(page):
    """Those of an earlier release, too, would be no command of `test_commands_parse`."""
    text = (ROOT / page).read_text()
    named = set(re.findall(r"(?:^|`)(?:srun )?hvit ([a-z]\w*)", text, re.MULTILINE))
    assert named <= set(records())


def test_few_snippets_are_not_run():
    reasons = [each.reason for page in PAGES for each in snippets(page) if each.reason]
    everything = [each for page in PAGES for each in snippets(page)]
    assert len(reasons) == 36 and len(everything) - len(reasons) >= 35


def test_the_first_lines_of_the_readme_run():
    names = {}
    exec(next(each.code for each in snippets("README.md") if each.language == "python"), names)
    assert names["logits"].shape == (2, 10)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What a reader has: `hvit` and `python`, and a cache of compiled programs."""
    folder = tmp_path_factory.mktemp("programs")
    for name, module in (("python", ""), ("hvit", "-m hvit_jax")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        program.chmod(0o755)
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TMPDIR": str(tmp_path_factory.mktemp("temporary")),
    }


@pytest.mark.slow  # Minutes: they evaluate, profile, compare, calibrate, train, export and draw.
@pytest.mark.parametrize("page", [page for page in PAGES if page != GUIDE])
def test_snippets_run(page, environment, tmp_path):
    """All of a page in one folder: first its commands, then its Python, each in one process."""
    for name in ("eval.py", "profile.py", "convert", "benchmarks", "hvit_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = tmp_path / "page.py"
    script.write_text(runnable(page, "python"))
    for words in (["bash", "-euc", runnable(page, "bash")], ["python", script]):
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
