import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.text import json_values, read_json_lines, read_text, text_blocks
from core.errors import UserError


def lines_of(path: Path, content: bytes | str) -> list[tuple[str, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_json_lines(path))


def test_text_keeps_its_line_ends_and_loses_its_mark(tmp_path, capsys):
    path = tmp_path / "a.txt"
    for mark in ("", "\ufeff"):
        path.write_bytes((mark + "á\r\nb\u2028c \ufeff 😀\n").encode())
        assert read_text(path) == "á\r\nb\u2028c \ufeff 😀\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufeffpacked".encode()))
    assert read_text(tmp_path / "a.txt.gz") == "packed"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo \xe9t\xe9\n", r"line 2 is not UTF-8 text \(byte 0xe9 at offset 8: .*LATIN1"),
        (b"a\n\nb\xc3", r"line 3 is not UTF-8 text \(byte 0xc3 at offset 4: unexpected end of data"),
        ("text".encode("utf-16"), r"is not UTF-8 text but UTF-16.*iconv -f UTF-16"),
        ("text".encode("utf-32"), r"is not UTF-8 text but UTF-32"),
        ("\ufefftext".encode("utf-16-be"), r"is not UTF-8 text but UTF-16"),
        ("x\nab".encode("utf-16-le"), r"or UTF-16 without a mark \(line 1 has a zero byte at offset 1"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0", r"binary.*line 3 has a zero byte at offset 8"),
    ],
)
def test_what_is_no_utf8_is_refused_with_its_place(tmp_path, content, message):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_text(tmp_path / name)
    if not message.startswith("line"):  # else the lines before are not JSON
        with pytest.raises(UserError, match=message):
            list(read_json_lines(tmp_path / "a.jsonl"))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aé😀\n\x7f", max_size=60), st.integers(0, 300), st.integers(1, 9))
def test_the_place_of_a_wrong_byte_does_not_depend_on_blocks(text, at, size):
    good = text.encode()
    before = good[: at % (len(good) + 1)]
    while before and before[-1] & 0xC0:  # not within a character
        before = before[:-1]
    content = before + b"\xff" + good
    offset, line = len(before), before.count(b"\n") + 1
    with pytest.raises(UserError, match=rf"a line {line} is not UTF-8.*byte 0xff at offset {offset}:"):
        list(text_blocks(io.BufferedReader(io.BytesIO(content)), Path("a"), size))
    assert "".join(text_blocks(io.BufferedReader(io.BytesIO(good)), Path("a"), size)) == text


def test_lone_surrogates_are_replaced_and_said(tmp_path, capsys):
    """As escapes in values and names, and as bytes; whole pairs stay."""
    path = tmp_path / "a.jsonl"
    found = lines_of(path, '{"a": 1}\n{"a": ["\\ud83d", {"\\ude00k": "\\ud83d\\ude00"}]}\n"\\udc00"\n')
    assert [value for _, value in found] == [{"a": 1}, {"a": ["\ufffd", {"\ufffdk": "😀"}]}, "\ufffd"]
    assert "lines with them: 2 (the first is line 2)" in capsys.readouterr().err
    surrogate = "\ud83d".encode("utf-8", "surrogatepass")
    assert lines_of(path, b'"' + surrogate + b'"')[0][1] == "\ufffd"
    (tmp_path / "a.txt").write_bytes(b"a" + surrogate + "😀".encode())
    capsys.readouterr()
    assert read_text(tmp_path / "a.txt") == "a\ufffd😀"
    assert "replaced 1 lone surrogates by U+FFFD" in capsys.readouterr().err


def test_json_lines_say_where_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    assert lines_of(path, '\ufeff{"a": 1}\n\n \t\n\ufeff[2]\r\n"\u2028"') == [
        (f"{path} line 1", {"a": 1}), (f"{path} line 4", [2]), (f"{path} line 5", "\u2028"),
    ]  # fmt: skip
    assert lines_of(path, "") == lines_of(path, "\ufeff\n") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n\n{"a": \n', "line 3 is not JSON"),
        ('{"a": 1} {"a": 2}\n', "line 1 is not JSON"),
        (b'{"a": "x"}\n{"a": "\xe9"}\n', r"line 2 is not UTF-8 text \(byte 0xe9 at offset 18"),
        ("[1, 2\n", "line 2 is not JSON .*not followed by"),
        ("[1,\n2,]", "line 2 is not JSON .*nothing follows the comma"),
        ("[1\n2]", "line 2 is not JSON .*not followed by"),
        ("[1,\n\n{]", "line 3 is not JSON"),
        ("[1]\n{}", "line 2 is not JSON .*something follows the array"),
        ("[1],", "line 1 is not JSON .*something follows the array"),
        ("[1,", "line 1 is not JSON .*has no end"),
        ('{\n"a": 1\n', "line 1 is not JSON"),
        ('[{"a": 1,\n"b": "c\n", "d": "of some length"}]', "line 2 is not JSON .*[Cc]ontrol character"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_what_is_not_json_is_refused_with_its_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        lines_of(tmp_path / "a.json", content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=6), st.integers(1, 40),
       st.sampled_from([None, 0, 2]), st.booleans())  # fmt: skip
def test_arrays_lines_and_pretty_objects_give_the_same_values(values, size, indent, escaped):
    """However long the blocks are in which they come."""

    def read(text: str) -> list[Any]:
        stream = io.BufferedReader(io.BytesIO(text.encode()), buffer_size=size)
        return [value for _, value in json_values(stream, Path("a"), block=size)]

    def dump(value: Any, indent: int | None = indent) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=escaped)

    values = json.loads(json.dumps(values).encode("utf-8", "replace"))  # text without lone surrogates
    assert read(dump(values)) == values
    assert read("".join(dump(value, None) + "\n" for value in values)) == values
    if indent is not None and values and values[0]:  # the first one then shows by its first line
        assert read("\n".join(map(dump, values))) == values
