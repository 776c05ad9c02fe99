"""The version is the same wherever it is written."""

from __future__ import annotations

import re
from pathlib import Path

import mas_ext

ROOT = Path(__file__).parents[2]


def test_the_citation_has_the_version():
    lines = (ROOT / "CITATION.cff").read_text("utf-8").splitlines()
    assert f"version: {mas_ext.__version__}" in lines


def test_the_changelog_has_the_version_below_what_is_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## \[(.+)\](?: - (.+))?$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == mas_ext.__version__
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in headings[1:])
