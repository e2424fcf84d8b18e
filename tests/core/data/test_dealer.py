"""Which of several processes makes which piece of the text."""

from pathlib import Path

from core.data.pieces import TRAIN, Dealer, Job, Part
from core.data.source import Source


class Text(Source):
    def __init__(self, one_reader: bool = False) -> None:
        self.one_reader = one_reader

    def documents(self):
        return iter(())

    def identity(self) -> str:
        return ""


def dealt(folder: Path, in_order: bool, *one_reader: bool) -> list[tuple[int, int] | None]:
    """The first task of each of three processes in turn; nothing is made meanwhile."""
    parts = [Part(Text(one), TRAIN, None) for one in one_reader]
    dealer = Dealer(Job(folder, "bytes", parts, [f"{n}" for n in range(len(parts))], 1, None), in_order)
    return [dealer.next_task(process) for process in range(3)]


def test_each_process_has_a_part_of_its_own_while_there_is_one(tmp_path):
    assert dealt(tmp_path, False, False, False) == [(0, 0), (1, 0), (0, 1)]


def test_what_the_text_begins_with_is_made_first_where_its_end_may_not_be_needed(tmp_path):
    assert dealt(tmp_path, True, False, False) == [(0, 0), (0, 1), (0, 2)]


def test_a_part_that_takes_long_to_read_has_one_reader(tmp_path):
    assert dealt(tmp_path, True, True, True) == dealt(tmp_path, False, True, True) == [(0, 0), (1, 0), None]
    assert dealt(tmp_path, False, True, False) == [(0, 0), (1, 0), (1, 1)]
