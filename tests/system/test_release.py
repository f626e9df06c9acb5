"""What a release says of itself: one version, and the papers of all methods."""

import re
from pathlib import Path

import yaml

import hvit_jax

ROOT = Path(__file__).parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## \[(.+?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    stated = (CITATION["version"], str(CITATION["date-released"]))
    assert newest.groups() == stated and stated[0] == hvit_jax.__version__


def test_the_paper_of_every_method_is_cited():
    cited = {each["doi"].removeprefix("10.48550/arXiv.") for each in CITATION["references"]}
    for name, reducer in hvit_jax.REDUCERS.items():
        papers = set(re.findall(r"\b\d{4}\.\d{5}\b", reducer.__doc__ or ""))
        assert not papers or papers & cited, name
