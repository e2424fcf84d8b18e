"""Results in a model card whose owner has written into it: they are there once, and what is his stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from eval.card import HEADING, check_card, update_card

FRONT = "---\nlicense: mit\n---\n"
NOTE = "| gpus |\n|---|\n| 1 |\n\nMeasured by me.\n\n"


def results(accuracy: float) -> dict[str, Any]:
    """What eval.run found, of one task."""
    entry = {"questions": 5, "of": 5, "version": 1, "shots": 0}
    entry |= {"metrics": {"acc": {"value": accuracy, "stderr": 0.01}}}
    evaluation = {"settings": {"dtype": "float32"}, "truncated": 0, "tasks": {"arc_easy": entry}}
    return {"model": {"name": "small"}, "evaluations": {"arc_easy": evaluation}}


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace(f"{HEADING}\n", f"{HEADING}  \n"),
        lambda text: text.replace(f"{HEADING}\n\n", f"{HEADING}\n"),
        lambda text: text.replace("| task | metric |", "| task  |  metric |"),
        lambda text: text.replace("\n| ", "\n  | "),
        lambda text: text.rstrip("\n"),
        lambda text: text[: text.index("| task")].rstrip(),
    ],
)
def test_a_section_that_was_edited_is_the_section(edit: Callable[[str], str], tmp_path: Path):
    """An editor has changed its blanks, or its table was removed."""
    card = tmp_path / "README.md"
    card.write_text(f"{FRONT}# Small\n")
    update_card(tmp_path, results(0.5))
    expected = card.read_text().replace("50.00", "25.00").replace("0.5\n", "0.25\n")
    card.write_bytes(edit(card.read_text()).encode())
    update_card(tmp_path, results(0.25))
    assert card.read_text() == expected  # which reads \r\n as \n


def test_what_is_written_around_the_table_stays(tmp_path: Path):
    """Between heading and table, below it, and in the next section, whose table has the same columns."""
    card = tmp_path / "README.md"
    card.write_text(f"{FRONT}# Small\n")
    update_card(tmp_path, results(0.5))
    theirs = "\nNot the best.\n\n## Others\n\n| task | metric | value | protocol |\n|---|---|---|---|\n"
    card.write_text(card.read_text().replace(f"{HEADING}\n\n", f"{HEADING}\n\n{NOTE}") + theirs)
    expected = card.read_text().replace("50.00", "25.00").replace("0.5\n", "0.25\n")
    for _ in range(2):
        update_card(tmp_path, results(0.25))
        assert card.read_text() == expected
    assert NOTE in expected and expected.endswith(theirs)


def test_a_front_matter_that_is_no_yaml_is_refused_in_a_line(tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n# Small\n")
    with pytest.raises(UserError, match=r"the front matter of \S+ cannot be read: .*flow node[^\n]*$"):
        check_card(tmp_path)
