"""What every source of documents offers."""

import abc
from collections.abc import Iterator


class Source(abc.ABC):
    """Documents under one name."""

    name: str
    size: int
    """What `documents` counts its position in: bytes on disk where there are any, else documents."""
    one_reader = False
    """Whether reading takes so long that several processes should not all read it to share the rest."""

    @abc.abstractmethod
    def documents(self) -> Iterator[tuple[str | None, int]]:
        """(text, position in 0..size after it) of every document, empty ones included; None for a row that
        has no text: a field of it is missing or null."""

    @abc.abstractmethod
    def identity(self) -> str:
        """Changes when the documents do, as far as can be told without reading them."""

    def parts(self) -> list["Source"]:
        """What can be read by itself, in order; its documents joined are those of the source."""
        return [self]
