"""What is compiled after the first update, and what had changed: nothing of an update should be.

JAX says which argument of a function has another shape, type or sharding than before
(`jax_explain_cache_misses`), and how long each compilation took. The training step is compiled ahead of time,
and refuses what does not fit: `differences` names it.
"""

import logging
import re
from typing import Any, NamedTuple

import jax

_LOGGERS = [  # where JAX logs why it traces again, and with the same flag what is kept on the disk
    logging.getLogger(f"jax._src.{name}")
    for name in ("interpreters.partial_eval", "compiler", "compilation_cache")
]
_KEPT = re.compile("PERSISTENT COMPILATION CACHE MISS|Not writing persistent|Writing .* to persistent")
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilation(NamedTuple):
    """One that was heard."""

    function: str
    seconds: float
    changed: str
    """Which arguments differ from those before; empty for a function that was not used before."""
    in_update: bool
    """Whether an update needed it, and not an evaluation, a sample or a checkpoint."""

    def __str__(self) -> str:
        why = self.changed or "first use"
        return f"{self.function} was compiled, which took {self.seconds:.1f} s: {why}"


class Compilations:
    """A context manager: from `begin` to its end it hears every compilation of this process."""

    def __init__(self) -> None:
        self.in_update = False
        """To be set while an update is dispatched."""
        self._open = self._hearing = False
        self._wanted = False  # whether the user has JAX explain
        self._heard: list[Compilation] = []
        self._changed: dict[str, str] = {}

    def __enter__(self) -> "Compilations":
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._hearing:
            jax.config.update("jax_explain_cache_misses", self._wanted)
            for logger in _LOGGERS:
                logger.removeFilter(self._explained)
        self._open = self._hearing = False  # a listener cannot be taken back; it hears nothing more

    def begin(self) -> None:
        """Hears from now on, if the context is entered: what a run needs has been compiled."""
        if self._open and not self._hearing:
            self._hearing = True
            for logger in _LOGGERS:
                logger.addFilter(self._explained)
            self._wanted = jax.config.jax_explain_cache_misses
            jax.config.update("jax_explain_cache_misses", True)
            jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def take(self) -> list[Compilation]:
        """What was heard since the last call."""
        heard, self._heard = self._heard, []
        return heard

    def add(self, compilation: Compilation) -> None:
        """One of which more is known than is heard: it takes the place of what was heard of it."""
        self._heard = [one for one in self._heard if one.function != compilation.function]
        self._heard.append(compilation)

    def _explained(self, record: logging.LogRecord) -> bool:
        """JAX's explanations come here, and not to the terminal of a user who did not ask JAX for them."""
        text = record.getMessage()
        if not text.startswith("TRACING CACHE MISS"):
            return self._wanted or not _KEPT.match(text)
        if function := re.search(r"^  for (\S+)", text, re.MULTILINE):
            changes = re.findall(r"^  \* (?:at )?(.*)$", text, re.MULTILINE)
            self._changed[function[1]] = "; ".join(changes)
        return self._wanted

    def _compiled(self, event: str, seconds: float, **more: Any) -> None:
        if self._hearing and event == _COMPILED:
            function = re.sub(r"^\w+\((.*)\)$", r"\1", more.get("fun_name", "a function"))
            changed = self._changed.pop(function, "")
            self._heard.append(Compilation(function, seconds, changed, self.in_update))


def differences(expected: Any, given: Any) -> list[str]:
    """Which leaves of `given` have another shape, type or sharding than the trees of `expected`, by path.

    expected: of `jax.ShapeDtypeStruct` or arrays.
    """
    before = dict(jax.tree_util.tree_leaves_with_path(expected))
    now = dict(jax.tree_util.tree_leaves_with_path(given))
    found = []
    for path in [*before, *(path for path in now if path not in before)]:
        old, new = (_describe(leaves[path]) if path in leaves else "absent" for leaves in (before, now))
        if old == new and path in before and path in now:
            old, new = (str(getattr(leaves[path], "sharding", None)) for leaves in (before, now))
            if not _same_place(before[path], now[path]):
                found.append(f"{_name(path)} lies on {new}, before on {old}")
        elif old != new:
            found.append(f"{_name(path)} is {new}, before {old}")
    return found


def _name(path: Any) -> str:
    return "".join(str(key) for key in path).removeprefix(".")


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _same_place(old: Any, new: Any) -> bool:
    here, there = (getattr(leaf, "sharding", None) for leaf in (old, new))
    return here is None or there is None or here.is_equivalent_to(there, len(old.shape))
