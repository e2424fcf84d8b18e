"""The text of a row: a field within another, several by a template, and rows that lack one."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from core.data import file_source
from core.data.rows import MISSING, RowText, find
from core.data.sources import open_sources
from core.data.splits import make_plan
from core.errors import UserError
from train_tpu import prepare as command

ROWS = [
    {"title": "One", "text": "first", "meta": {"lang": "en", "by": {"name": "A"}}},
    {"title": None, "text": "second", "meta": {"lang": "en", "by": None}},
    {"title": "Three", "text": "", "meta": {"lang": None, "by": {"name": "C"}}},
    {"title": "Four", "text": None, "meta": None},
]


def write(folder: Path, form: str, rows: list[dict] = ROWS) -> str:
    path = folder / f"rows.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("field", "template", "texts"),
    [
        ("text", None, ["first", "second", "", None]),
        ("meta.lang", None, ["en", "en", None, None]),
        ("meta.by.name", None, ["A", None, "C", None]),
        ("text", r"{title}\n\n{text}", ["One\n\nfirst", None, "Three\n\n", None]),
        ("text", "{{{meta.by.name}}} {text}{text}", ["{A} firstfirst", None, "{C} ", None]),
    ],
)
def test_texts_of_rows(tmp_path, form, field, template, texts):
    (source,) = open_sources([write(tmp_path, form)], field, template=template)
    assert [text for text, _ in source.documents()] == texts


def test_held_out_rows_have_their_texts_from_the_same_template(tmp_path):
    train, held = write(tmp_path, "jsonl"), write(tmp_path, "parquet", ROWS[::-1])
    plan = make_plan([train], {"held": held}, None, template="{title}: {text}")
    texts = {part.split: [text for text, _ in part.source.documents()] for part in plan.parts}
    assert texts == {
        "train": ["One: first", None, "Three: ", None],
        "held": [None, "Three: ", None, "One: first"],
    }


def test_a_name_that_is_there_as_it_stands_goes_first():
    assert find({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert find({"a": {"b.c": 2}}, "a.b.c") == 2
    assert find({"a": {"b": 2}}, "a.c") is MISSING
    assert find({"a": 3}, "a.b") is MISSING
    assert find([1], "a") is MISSING


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "needs a name in every pair of braces"),
        ("{title", "expected '}' before end of string"),
        ("{}", "needs a name"),
        ("{text:>9}", "needs a name in every pair of braces, and nothing else"),
        ("{text!r}", "needs a name in every pair of braces, and nothing else"),
    ],
)
def test_templates_that_make_no_sense(template, message):
    with pytest.raises(UserError, match=message):
        RowText(template=template)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--field", "body"], "no text in the (field|column) 'body' .*fields|columns: title, text"),
        (["--field", "meta.body"], "no text in the (field|column) 'meta.body'"),
        (["--template", "{title} {nonesuch}"], "no text in the (field|column) 'nonesuch'"),
        (["--field", "body", "--template", "{text}"], "give --field or --template, not both"),
    ],
)
def test_fields_that_no_row_has_are_refused(tmp_path, form, arguments, message):
    source = write(tmp_path, form)
    with pytest.raises(UserError, match=message):
        command.main([source, "--out", str(tmp_path / "out"), "--tokenizer", "bytes", *arguments])
    assert [path.name for path in tmp_path.iterdir()] == [Path(source).name]


def test_a_field_that_no_row_has_is_refused_early(tmp_path, monkeypatch):
    """Within the first rows, not at the end of the file; one that a few rows lack is not refused."""
    monkeypatch.setattr(file_source, "SEARCHED", 5)
    late = write(tmp_path, "jsonl", [{"id": "x"}] * 4 + [{"text": "late"}] * 2)
    assert [text for text, _ in open_sources([late])[0].documents()] == [None] * 4 + ["late"] * 2
    path = Path(write(tmp_path, "jsonl", [{"id": "x"}] * 5))
    path.write_text(path.read_text() + "no JSON")
    with pytest.raises(UserError, match=r"line 1 has no text in the field 'text' \(its fields: id\)"):
        list(open_sources([str(path)])[0].documents())


def test_rows_without_text_are_counted_and_said(tmp_path, capsys):
    rows = [{"title": f"T{n}", "text": f"some words {n} " * 20} for n in range(20)]
    rows[3]["title"], rows[7]["text"] = None, None
    del rows[11]["title"]
    rows += [{"title": "end", "text": None}]
    out = tmp_path / "out"
    arguments = [write(tmp_path, "jsonl", rows), "--out", str(out), "--tokenizer", "bytes", "--context", "32"]
    command.main([*arguments, "--template", "{title}: {text}"])
    assert (
        "left out: 4 rows of which a field is missing or null, 0 empty documents" in capsys.readouterr().out
    )
    manifest = json.loads((out / "dataset.json").read_text())
    assert manifest["dropped"]["rows_without_text"] == 4
    assert manifest["splits"]["train"]["documents"] == 17
