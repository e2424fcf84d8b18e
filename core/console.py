"""Standard output: lines as they are, and tables that come out whole.

Rich gives a pipe or a file the 80 columns of a terminal and cuts what does not fit; a figure that is cut is
lost. So where standard output is no terminal a table is as wide as it needs to be. On a terminal that is too
narrow its texts are folded, and its figures are left as they are.
"""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.segment import Segments
from rich.table import Column  # noqa: TID251
from rich.table import Table as RichTable  # noqa: TID251
from rich.text import Text

UNBOUNDED = 1 << 20  # characters: wider than any table
FOLDED = 16  # characters: no text is folded to fewer, nor a number within it


def make_console(quiet: bool = False) -> Console:
    """Standard output, or nothing; lines are never cut to a width where it is not a terminal. Brackets are
    text: a path may have them."""
    return Console(quiet=quiet, soft_wrap=not sys.stdout.isatty(), markup=False)


class Table:
    """Rows of texts followed by figures."""

    def __init__(
        self, texts: Sequence[str], figures: Sequence[str] = (), *, title: str = "", ruled: bool = True
    ):
        """texts, figures: the headers of the columns; without any there is no line of them.

        ruled: whether lines are drawn around the cells.
        """
        columns = [Column(Text(name), overflow="fold") for name in texts]
        columns += [Column(Text(name), justify="right", no_wrap=True) for name in figures]
        look = {} if ruled else {"box": None, "padding": (0, 2, 0, 0)}
        self._table = RichTable(
            *columns,
            title=Text(title, style="table.title") if title else None,
            show_header=any((*texts, *figures)),
            **look,
        )
        self._n_texts = len(texts)

    def add_row(self, *cells: str) -> None:
        """Cells are no markup: names of files and fields may hold brackets. The last ones may be left out."""
        self._table.add_row(*map(Text, cells))

    def print(self, console: Console | None = None) -> None:
        """console: default: standard output."""
        console = console or make_console()
        unbounded = console.options.update_width(UNBOUNDED)
        width = console.measure(self._table, options=unbounded).maximum
        if not console.soft_wrap:
            folding = sum(
                max(0, max(cell.cell_len for cell in (column.header, *column.cells)) - FOLDED)
                for column in self._table.columns[: self._n_texts]
            )
            width = min(width, max(console.width, width - folding))
        segments = console.render(self._table, console.options.update_width(width))
        console.print(Segments(segments), crop=False)
