"""Tables come out whole, whatever they are printed on."""

import io
import random

import pytest
from rich.console import Console

from core.console import FOLDED, Table, make_console

NAME = "runs/no-document-mask-of-a-long-name-0"
FIGURES = ("tokens/s", "up to 128", "up to 512", "over 512", "cut by a window", "all")


def table_of(texts: list[str], figures: list[str], **options) -> Table:
    table = Table(
        [f"text {n}" for n in range(len(texts))], [f"figure {n}" for n in range(len(figures))], **options
    )
    table.add_row(*texts, *figures)
    return table


def cells(printed: str) -> list[list[str]]:
    """The columns of a ruled table of one row: of each the lines of the row."""
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    return [[line.strip() for line in column] for column in zip(*rows, strict=True)]


def printed_on_terminal(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    table.print(console)
    return console.file.getvalue()


def test_a_pipe_gets_every_row_on_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("COLUMNS", "80")  # what rich takes a pipe's width from
    figures = [f"{n}.{n:04}" for n in range(len(FIGURES))]
    table = Table(("run", "masked"), FIGURES, title="wikipedia-2018 [first]")
    table.add_row(NAME, "no", *figures)
    table.print()
    title, _, header, _, row, _ = capsys.readouterr().out.splitlines()
    assert title.strip() == "wikipedia-2018 [first]"
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == ["run", "masked", *FIGURES]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [NAME, "no", *figures]


def test_a_table_without_rules_or_header(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("COLUMNS", "80")
    what = " and ".join([NAME] * 10)
    table = Table(("", ""), ruled=False)
    table.add_row("data", what)
    table.print(make_console())
    assert capsys.readouterr().out.rstrip() == f"data  {what}"


def test_a_narrow_terminal_folds_texts_and_never_figures():
    """Of drawn tables on terminals of any width: nothing is lost, and what can fit does."""
    draw = random.Random(0)
    folded = 0
    for _ in range(300):
        texts = ["x" * draw.randint(1, 60) for _ in range(draw.randint(0, 3))]
        figures = ["9" * draw.randint(1, 24) for _ in range(draw.randint(1, 8))]
        width = draw.randint(1, 200)
        printed = printed_on_terminal(table_of(texts, figures), width)
        lines = printed.splitlines()
        columns = cells(printed)
        assert ["".join(column) for column in columns[: len(texts)]] == texts
        assert [column[0] for column in columns[len(texts) :]] == figures
        headers = [len("text 0")] * len(texts) + [len("figure 0")] * len(figures)
        needed = [max(pair) for pair in zip(headers, map(len, texts + figures), strict=True)]
        narrowest = [min(n, FOLDED) for n in needed[: len(texts)]] + needed[len(texts) :]
        rules = 3 * len(needed) + 1  # "│ x │ x │"
        assert {len(line) for line in lines} == {min(sum(needed) + rules, max(width, sum(narrowest) + rules))}
        folded += any(len(column) > 1 for column in columns)
    assert folded > 50


def test_cells_are_no_markup():
    printed = printed_on_terminal(table_of(["runs/a[bold]:x:[/i]"], ["1"]), 80)
    assert "runs/a[bold]:x:[/i]" in printed


def test_a_quiet_console_prints_nothing(capsys: pytest.CaptureFixture):
    table_of([NAME], ["1"]).print(make_console(quiet=True))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("path", ["runs/lr[a]", "runs/x[/y]", "runs/[bold]"])
def test_brackets_are_printed_as_they_are(path: str, capsys):
    """As markup they vanish, or end a finished run with a traceback."""
    make_console().print(f"loss curve: {path}/loss_curve.png", highlight=False)
    assert capsys.readouterr().out == f"loss curve: {path}/loss_curve.png\n"
