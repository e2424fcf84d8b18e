"""The documents name tests that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Within one document a file may be named by its last part, or left out where it is the one before.
NAMED = re.compile(r"`((?:[\w/]*test_\w+\.py)?)::(test_\w+)`")


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_the_tests_that_are_named_exist(document):
    file = ""
    for named, test in NAMED.findall(document.read_text(encoding="utf-8")):
        file = named or file
        (found,) = ROOT.glob(f"tests/**/{Path(file).name}") if "/" not in file else [ROOT / file]
        assert f"def {test}(" in found.read_text(encoding="utf-8"), f"{document.name}: {file}::{test}"
