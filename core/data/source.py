"""What every source of documents offers."""

import abc
from collections.abc import Iterator


class Source(abc.ABC):
    """Documents under one name."""

    name: str
    size: int
    """What `documents` counts its position in: bytes on disk where there are any, else documents."""

    @abc.abstractmethod
    def documents(self) -> Iterator[tuple[str, int]]:
        """(text, position in 0..size after it) of every document, empty ones included."""

    @abc.abstractmethod
    def identity(self) -> str:
        """Changes when the documents do, as far as can be told without reading them."""
