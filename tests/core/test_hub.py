"""A Hub that answers, one that is not there, and one that never answers."""

import socket
from pathlib import Path

import huggingface_hub
import pytest

from core import hub
from core.errors import UserError
from tests.hub import Hub, point_at

NOBODY = "http://127.0.0.1:9"  # the port "discard": nothing listens there


def test_whatever_answers_can_be_reached(served: Hub):
    assert hub.why_unreachable() is None
    served.errors["/"] = (403, "")
    assert hub.why_unreachable() is None
    assert served.asked == ["HEAD /", "HEAD /"]


def test_what_refuses_the_connection_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    point_at(monkeypatch, NOBODY, tmp_path)
    with pytest.raises(UserError, match=rf"^It is away, and {NOBODY} cannot be reached \(.*refused\): check"):
        hub.require_reachable("It is away")


def test_one_that_never_answers_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A command has 2 of its 5 seconds for everything else; who has a slow connection gives it longer."""
    asked = []
    listener = socket.create_server(("127.0.0.1", 0))  # connections wait in its queue for ever
    point_at(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path)
    assert hub.PATIENCE <= 2
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    assert hub.why_unreachable() in ("timed out", "no answer within 0.2 s")
    assert hub.why_unreachable(0.1) in ("timed out", "no answer within 0.1 s")
    listener.close()

    class Session:
        def head(self, address: str, timeout: float) -> None:
            asked.append(timeout)

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 30)
    hub.why_unreachable()
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30")
    hub.why_unreachable()
    assert asked == [0.2, 30]


def test_a_look_up_that_hangs_is_given_up_too(monkeypatch: pytest.MonkeyPatch):
    import threading

    class Session:
        def head(self, address: str, timeout: float) -> None:
            threading.Event().wait(60)

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    assert hub.why_unreachable(0.1) == "no answer within 0.1 s"


def test_offline_by_its_own_setting_no_one_is_asked(served: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^It is away, and HF_HUB_OFFLINE forbids .*: unset that"):
        hub.require_reachable("It is away")
    assert not served.asked
