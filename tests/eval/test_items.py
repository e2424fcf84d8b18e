"""The texts of evaluation items, for the overlap with training text."""

import json

import pytest

from core.data.sources import open_sources
from core.errors import UserError
from eval.items import main
from tests.eval.small_sets import write
from tests.eval.test_local_data import ARC, NESTED, PIQA


def test_every_text_of_an_item_is_written_once_and_read_by_prepare(tmp_path, capsys):
    write(tmp_path / ARC, (json.dumps(NESTED) + "\n") * 2)
    write(tmp_path / "piqa/validation.jsonl", json.dumps(PIQA | {"goal": "a long\ngoal é"}) + "\n")
    out = tmp_path / "items.jsonl"
    assert main(["--tasks", "arc_easy", "piqa", "--data-dir", str(tmp_path), "--out", str(out)]) == 0
    assert "arc_easy: 2 items, " in capsys.readouterr().out
    found = [text for text, _ in open_sources([str(out)])[0].documents()]
    assert set(found) >= {"Cold?", "ice", "fire", "a long\ngoal é", "b"}
    assert found.count("Cold?") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks", "nonesuch", "--data-dir", "{here}", "--out", "{here}/x"],
            "unknown task 'nonesuch': files",
        ),
        (["--tasks", "piqa", "--data-dir", "{here}", "--out", "{here}/x"], "the data of piqa is not there"),
        (["--tasks", "piqa", "--out", "{here}/x"], "give the folder of the tasks' files with --data-dir"),
        (["--tasks", "piqa", "--data-dir", "{here}", "--out", "{here}"], "exists already"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main([argument.format(here=tmp_path) for argument in arguments])
    assert list(tmp_path.iterdir()) == []
