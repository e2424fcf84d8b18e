"""The Hub's libraries kept offline where it does not answer: they retry for a minute."""

import functools

from core.hub import why_unreachable


@functools.cache
def go_offline_if_unreachable() -> None:
    """Has the Hub's libraries look only at what this machine has, if the Hub does not answer.

    HF_HUB_OFFLINE says the same, and is not asked again.
    """
    import datasets
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE or why_unreachable() is None:
        return
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
