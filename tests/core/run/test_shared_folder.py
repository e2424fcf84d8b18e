"""A run folder that several processes share, or not."""

from pathlib import Path

import pytest

import core.run.folder
from core.errors import UserError
from core.run.folder import require_shared


def test_a_shared_folder_passes_and_keeps_no_mark(tmp_path: Path):
    require_shared(tmp_path, True, lambda value: value, lambda blind: blind)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_one_process_does_not_see_is_refused_in_all(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(core.run.folder, "NOTICING", 0.0)
    first = str(tmp_path / "one" / ".shared-0")
    with pytest.raises(UserError, match=f"not every process sees the folder {tmp_path / 'one'}"):
        require_shared(tmp_path / "two", False, lambda _: first, lambda blind: blind)
    with pytest.raises(UserError, match="not every process sees"):
        require_shared(tmp_path, True, lambda value: value, lambda _: True)  # another one is blind
    assert not list(tmp_path.iterdir())
