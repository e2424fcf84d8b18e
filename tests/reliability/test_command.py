"""The trial is started by hand, so nothing else notices that it cannot start."""

import sys

import pytest

from tests.reliability.__main__ import main


def test_the_command_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["tests.reliability", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "flips-kernels" in capsys.readouterr().out
