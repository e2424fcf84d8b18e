"""Hears every compilation of this process."""

import jax
import jax.numpy as jnp

from tests.checks import require


def listen() -> list[str]:
    """A list to which every compilation from now on is added; it is shown to work, and empty."""
    heard: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: heard.append(event) if "backend_compile" in event else None
    )
    jax.jit(lambda x: x * 5 + 13)(jnp.arange(3))
    require(heard, "the compilation was not heard")
    heard.clear()
    return heard
