"""What a file's name says of its format and compression, and opening it unpacked.

Every command that reads a user's text, rows, prompts or evaluation sets knows the same names.
"""

import bz2
import contextlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zstandard

from core.errors import UserError

Form = Literal["text", "json", "parquet"]

FORMS: dict[str, Form] = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KNOWN = f"{', '.join(FORMS)}, also with {', '.join(COMPRESSIONS)}"
"""The names that are read, for messages and help texts."""

ZST_WINDOW = 2**31
"""The largest window of a .zst file, in bytes: what `zstd --long=31` writes, its maximum."""


class Format(NamedTuple):
    """What a file's name says, in any case: `A.JSONL.gz` is json, .gz, with the stem `A`."""

    form: Form | None
    """None for a name that says nothing known."""
    compression: str
    """One of `COMPRESSIONS`, or empty."""
    stem: str
    """The name without the suffixes."""


def format_of(name: str | Path) -> Format:
    """The format that the name of a file stands for."""
    path = Path(name)
    compression = path.suffix.lower()
    plain = Path(path.stem) if compression in COMPRESSIONS else Path(path.name)
    form = FORMS.get(plain.suffix.lower())
    return Format(form, compression if plain.name != path.name else "", plain.stem if form else plain.name)


def find_variant(path: Path) -> Path | None:
    """`path`, or the file next to it that differs only in the suffixes of its form and compression.

    `questions.jsonl` finds questions.jsonl.gz or questions.json, never questions.txt.
    """
    if path.is_file():
        return path
    wanted = format_of(path)
    neighbours = sorted(path.parent.iterdir()) if wanted.form and path.parent.is_dir() else []
    same = (p for p in neighbours if p.is_file() and format_of(p)[::2] == wanted[::2])
    return next(same, None)


class Unpacked(NamedTuple):
    """An open file."""

    stream: io.BufferedReader
    """Its content, unpacked."""
    raw: io.BufferedReader
    """The file as it lies on the disk; `raw.tell()` says how far reading is, in its own bytes."""


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[Unpacked]:
    """Opens a file, unpacked as its name says. What goes wrong while it is read is a `UserError`, too."""
    try:
        with path.open("rb") as raw:
            yield Unpacked(_unpack(raw, format_of(path).compression), raw)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _unpack(raw: io.BufferedReader, compression: str) -> io.BufferedReader:
    if not compression:
        return raw
    start, padding = {
        ".gz": (lambda: zlib.decompressobj(wbits=31), 1),
        ".bz2": (bz2.BZ2Decompressor, 0),
        ".xz": (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), 4),
        ".zst": (zstandard.ZstdDecompressor(max_window_size=ZST_WINDOW).decompressobj, 0),
    }[compression]
    return io.BufferedReader(_Streams(raw, start, padding))


class _Streams(io.RawIOBase):
    """Compressed streams one behind another, unpacked to their last byte.

    The readers of `bz2` and `lzma` take anything that follows the first stream and is none itself for the
    end of the file, and zstandard's does not notice that a file ends in the middle of a frame. Here all of
    that is an error.

    padding: streams may be followed by zero bytes, a multiple of this many; 0 for none. The .xz format has 4,
    gzip skips any number.
    """

    BLOCK = 1 << 14
    """Bytes that are unpacked at once: few, since they may become thousands of times as many."""

    def __init__(self, raw: io.BufferedReader, start: Callable[[], Any], padding: int = 0) -> None:
        self._raw, self._start, self._padding = raw, start, padding
        self._decompressor: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(self.BLOCK)
            if not self._packed:
                if self._decompressor is not None:
                    raise EOFError("the file is cut short: its last compressed stream has no end")
                return 0
            if self._decompressor is None:
                self._decompressor = self._start()
            self._unpacked = memoryview(self._decompressor.decompress(self._packed))
            self._packed = b""
            if self._decompressor.eof:
                self._packed = self._decompressor.unused_data
                self._decompressor = None
                self._skip_padding()
        n = min(len(buffer), len(self._unpacked))
        buffer[:n] = self._unpacked[:n]
        self._unpacked = self._unpacked[n:]
        return n

    def _skip_padding(self) -> None:
        n_zeros = 0
        while self._padding:
            self._packed = self._packed or self._raw.read(self.BLOCK)
            rest = self._packed.lstrip(b"\0")
            n_zeros += len(self._packed) - len(rest)
            if rest or not self._packed:
                self._packed = rest
                break
            self._packed = b""
        if self._padding and n_zeros % self._padding:
            raise OSError(
                f"{n_zeros} zero bytes between two streams, which is not a multiple of {self._padding}"
            )
