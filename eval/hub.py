"""Whether the Hugging Face hub can be reached, asked once: its own libraries retry for a minute."""

import functools
import ssl
import threading
import urllib.error
import urllib.request

PATIENCE = 5.0  # seconds


@functools.cache
def go_offline_if_unreachable() -> None:
    """Has the hub's libraries look only at what this machine has, if the hub does not answer.

    HF_HUB_OFFLINE says the same, and is not asked again.
    """
    import datasets
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE or reachable(huggingface_hub.constants.ENDPOINT):
        return
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


def reachable(address: str, patience: float = PATIENCE) -> bool:
    """Whether anything answers at an address, through the proxy that the environment names if it does."""
    answered = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=patience).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except OSError as error:
            # Python's certificates may be others than those of the hub's libraries: they decide.
            if not isinstance(getattr(error, "reason", error), ssl.SSLError):
                return
        answered.append(True)

    asking = threading.Thread(target=ask, daemon=True)  # the look-up of a name knows no timeout
    asking.start()
    asking.join(patience)
    return bool(answered)
