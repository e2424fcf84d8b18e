"""The one reader of users' text: UTF-8 files, and JSON values out of them.

A byte order mark is left out. Text of another encoding and binary files are refused, with the place. Half a
surrogate pair, which crawls hold as JSON escapes (`"\\ud83d"`) and no text can, becomes U+FFFD wherever it
stands; how many lines or documents that concerned is said.
"""

import codecs
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.data.formats import open_unpacked
from core.errors import UserError

BLOCK = 1 << 20
HEAD = 1 << 13  # bytes at a file's beginning that show what it is
BOM = "\ufeff"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# UTF-16 and UTF-32, whose marks are no UTF-8. Without a mark they show by their zero bytes.
OTHER_BOMS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
ZEROS_OF_OTHERS = 1 / 16
"""A file whose beginning has at least this part of zero bytes is not UTF-8 text."""


def repair(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair."""
    return text if text.isascii() else LONE_SURROGATE.sub("\ufffd", text)


def read_text(path: Path) -> str:
    """All of a text file, unpacked as its name says (`core.data.formats`); line ends are kept as they are.

    Raises:
        UserError: it cannot be read, or is not text in UTF-8.
    """
    with open_unpacked(path) as (stream, _):
        text = "".join(text_blocks(stream, path))
    repaired = repair(text)
    if repaired != text:
        n = len(LONE_SURROGATE.findall(text))
        print(f"{path}: replaced {n:,} lone surrogates by U+FFFD", file=sys.stderr)
    return repaired


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it is, value) of every line of a JSONL file that is not blank, or item of a JSON array.

    Raises:
        UserError: it cannot be read, or what it holds is not JSON in UTF-8; with the line.
    """
    repaired_lines = []
    with open_unpacked(path) as (stream, _):
        for number, value in json_values(stream, path):
            repaired = _repair_value(value)
            if repaired != value:
                repaired_lines.append(number)
            yield place(path, number), repaired
    if repaired_lines:
        n, first = len(repaired_lines), repaired_lines[0]
        print(
            f"{path}: replaced lone surrogates by U+FFFD, lines with them: {n:,} (the first is line {first})",
            file=sys.stderr,
        )


def place(path: Path, line: int) -> str:
    """How a line of a file is named in messages."""
    return f"{path} line {line}"


def text_blocks(stream: io.BufferedReader, path: Path, size: int = BLOCK) -> Iterator[str]:
    """The text of a stream in UTF-8, block by block, about `size` bytes each; halves of surrogate pairs stay.

    Raises:
        UserError: the first byte that is not UTF-8, with its line and offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    offset, line, at_start = 0, 1, True
    while True:
        block = stream.read(size)
        if at_start:
            require_utf8(block[:HEAD], path)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            start = offset - (len(error.object) - len(block)) + error.start  # a character may span blocks
            before = error.object[: error.start]
            raise _not_utf8(path, line + before.count(b"\n"), start, error) from None
        offset, line = offset + len(block), line + block.count(b"\n")
        if at_start and text:
            text, at_start = text.removeprefix(BOM), False
        if text:
            yield text
        if not block:
            return


def json_values(stream: io.BufferedReader, path: Path, block: int = BLOCK) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line of a JSONL stream that is not blank, as they come.

    Also of a JSON array's items, or of values that are spread over lines: what begins with `[` or with a line
    of `{` alone. No more than a value and a block is held in memory.

    Raises:
        UserError: the first line that is not JSON in UTF-8.
    """
    head = stream.peek(1)
    require_utf8(head, path)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"[") or start.partition(b"\n")[0].strip() == b"{":
        yield from _Values(text_blocks(stream, path, block), path).all()
        return
    offset = 0
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8", "surrogatepass").removeprefix(BOM)
            if text and not text.isspace():
                yield number, json.loads(text)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, offset + error.start, error) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place(path, number)} is not JSON ({error}): correct it") from None
        offset += len(line)


class _Values:
    """JSON values out of text that comes in blocks: an array's items, or values one after another."""

    # A value cut short by the end of the text gives an error this near to it, or an unterminated string.
    NEAR_END = 12
    SPACE = re.compile(r"[ \t\n\r]*")

    def __init__(self, blocks: Iterator[str], path: Path) -> None:
        self._blocks, self._path = blocks, path
        self._text, self._at, self._line = "", 0, 1  # the line is that of the place `at`
        self._decoder = json.JSONDecoder()

    def all(self) -> Iterator[tuple[int, Any]]:
        is_array = self._next() == "["
        if is_array:
            self._move(self._at + 1)
        while (char := self._next()) and not (is_array and char == "]"):
            line = self._line
            yield line, self._value()
            if is_array and self._next() == ",":
                self._move(self._at + 1)
                self._require(self._next() != "]", "nothing follows the comma")
            elif is_array:
                self._require(self._next() == "]", "an item of the array is not followed by , or ]")
        if is_array:
            self._require(char == "]", "the array has no end")
            self._move(self._at + 1)
            self._require(not self._next(), "something follows the array")

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - self.NEAR_END
                if not cut:
                    self._move(error.pos)
                if not cut or not self._fill():  # what the file's end cuts short is named by its first line
                    self._require(False, error.msg.removesuffix(" at"))
            except RecursionError as error:
                self._require(False, str(error))
            else:
                length = end - self._at
                if end < len(self._text) or not self._fill():  # else a number may continue in the next block
                    self._move(self._at + length)
                    return value

    def _next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._move(self.SPACE.match(self._text, self._at).end())
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def _fill(self) -> bool:
        """Reads at least as much again as is there, so that a long value is tried few times."""
        self._text, self._at = self._text[self._at :], 0
        parts, wanted = [self._text], len(self._text) + 1
        while wanted > 0 and (block := next(self._blocks, "")):
            parts.append(block)
            wanted -= len(block)
        self._text = "".join(parts)
        return len(parts) > 1

    def _move(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise UserError(f"{place(self._path, self._line)} is not JSON ({otherwise}): correct it")


def require_utf8(head: bytes, path: Path) -> None:
    """A `UserError` where the beginning of a file shows another encoding, or that it is no text at all."""
    for mark, name in OTHER_BOMS.items():
        if head.startswith(mark):
            raise UserError(
                f"{path} is not UTF-8 text but {name}, as its first bytes say: "
                f"convert it (iconv -f {name} -t UTF-8)"
            )
    if head.count(0) > len(head) * ZEROS_OF_OTHERS:
        zero = head.index(0)
        line = head.count(b"\n", 0, zero) + 1
        raise UserError(
            f"{path} is not UTF-8 text but binary, or UTF-16 without a mark (line {line} has a zero byte at "
            f"offset {zero}): convert it or leave it out"
        )


def _not_utf8(path: Path, line: int, offset: int, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{place(path, line)} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {offset}: "
        f"{error.reason}): convert it (if it is Latin-1: iconv -f LATIN1 -t UTF-8) or leave it out"
    )


def _repair_value(value: Any) -> Any:
    """A JSON value with U+FFFD for every half of a surrogate pair in its strings and names."""
    if isinstance(value, str):
        return repair(value)
    if isinstance(value, list):
        return [_repair_value(item) for item in value]
    if isinstance(value, dict):
        return {repair(name): _repair_value(item) for name, item in value.items()}
    return value
