"""The parts of the documentation that are made from the code: each page holds what is made now."""

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import hvit_jax
from hvit_jax import REDUCERS
from hvit_jax.commands.main import COMMANDS
from hvit_jax.models.compiled import CompiledModel
from hvit_jax.models.vit import ViT

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_pages_are_up_to_date(hooks, path):
    page = path.read_text()
    assert page == hooks.filled(page), "run python docs/hooks.py"
    assert "\n::: " not in page  # It would not be readable as a file.


def test_a_method_page_can_be_read_as_a_file():
    page = (DOCS / "methods" / "tome.md").read_text()
    assert "Every block merges its `r` most redundant tokens" in page
    assert "| `r` | `--r` |" in page and "| vit_l16 | r=10 | 317.5 | 88.0 |" in page


def test_the_api_is_readable_as_a_file_and_whole_on_the_site(hooks):
    page = (DOCS / "api.md").read_text()
    assert "**`hvit_jax.count_flops(config, reducer)`**: " in page
    site = hooks.on_page_markdown(page)
    assert "\n::: hvit_jax.count_flops\n" in site and "<!-- api" not in site
    assert "::: hvit_jax.ViT\n    options:\n      members: [__call__, classify, " in site


# Kernels, and how operations are compiled and rounded: other parts need it, users do not.
_NAMES = "float8", "hopper_merging", "platform", "precision"
INSIDE = [f"hvit_jax.ops.{name}" for name in _NAMES]


def parts(kind):
    pages = "\n".join(path.read_text() for path in DOCS.rglob("*.md"))
    return re.findall(rf"^<!-- {kind}: (\S+)(.*?) -->$", pages, re.MULTILINE)


def public_names():
    """Name what packages export, and every module of operations."""
    yield from (f"hvit_jax.{name}" for name in hvit_jax.__all__)
    for _, module, is_package in pkgutil.walk_packages(hvit_jax.__path__, "hvit_jax."):
        if module.rpartition(".")[0] == "hvit_jax.ops" and module not in INSIDE:
            yield module
        elif is_package:
            exported = getattr(importlib.import_module(module), "__all__", ())
            yield from (f"{module}.{name}" for name in exported)


def test_every_public_name_is_in_the_reference():
    """By its name or another one; constants are named in the text."""
    documented = [pkgutil.resolve_name(name) for name, _ in parts("api")]
    documented += [REDUCERS[name] for name, _ in parts("about")]
    page, missing = (DOCS / "api.md").read_text(), []
    for name in public_names():
        found = pkgutil.resolve_name(name)
        constant = not (callable(found) or inspect.ismodule(found))
        if constant:
            there = f"`hvit_jax.{name.rpartition('.')[2]}`" in page
        else:
            there = any(found is each for each in documented)
        missing += [] if there else [name]
    assert not missing


@pytest.mark.parametrize("model", [ViT, CompiledModel])
def test_every_method_of_a_model_is_in_the_reference(model):
    (members,) = (more for name, more in parts("api") if pkgutil.resolve_name(name) is model)
    own = {name for name, each in vars(model).items() if inspect.isfunction(each)}
    own = {name for name in own if not name.startswith("_")} | {"__call__"}
    assert set(members.replace(",", "").split()) == own


def test_every_table_of_options_is_somewhere():
    assert {name for name, _ in parts("command")} == set(COMMANDS)
    optional = {name for name, reducer in REDUCERS.items() if dataclasses.fields(reducer)}
    assert {name for name, _ in parts("options")} == optional
    assert {name for name, _ in parts("about")} == set(REDUCERS) - {"dense"}
