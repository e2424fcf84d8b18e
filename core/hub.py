"""Whether the Hugging Face Hub answers, asked once and soon: its own client waits for ever, or retries."""

import os
import threading

from core.errors import UserError

PATIENCE = 2.0  # seconds, so that a command without a connection ends in under 5


def why_unreachable(patience: float | None = None) -> str | None:
    """Why the Hub does not answer; None if it does, whatever it says.

    Asked as its client asks, through the same proxies and with the same certificates.

    Args:
        patience: seconds to wait. Default: HF_HUB_ETAG_TIMEOUT, or 2 where that is not set.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if patience is None:
        patience = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE
    answers = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=patience)
            answers.append(None)
        except Exception as error:  # of httpx, whose name and errors vary with the client's version
            answers.append(str(error).partition("\n")[0] or type(error).__name__)

    # The look-up of a name knows no timeout, and that of a request holds for each of its steps.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience)
    return answers[0] if answers else f"no answer within {patience:g} s"


def require_reachable(what: str) -> None:
    """A UserError unless the Hub answers.

    what: the beginning of its sentence, which says why the Hub is needed.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{what}, and HF_HUB_OFFLINE forbids downloading it: unset that, or give local files")
    reason = why_unreachable()
    if reason is not None:
        raise UserError(
            f"{what}, and {constants.ENDPOINT} cannot be reached ({reason}): check your connection, or give "
            "local files (HF_HUB_ETAG_TIMEOUT=30 waits longer for a slow one)"
        )
