"""The parts of the documentation that are made from the code: each page holds what is made now."""

import importlib.util
from pathlib import Path

import pytest

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
