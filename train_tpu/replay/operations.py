"""A function carried out operation by operation, to find the first that makes a value which is not finite.

A function is traced to its operations, which are called one after the other. What one belongs to is the scope
in which it was traced (`core.model.scoped`).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

# Operations that call others, and where those stand.
CALLS = {
    "jit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


class Operation(NamedTuple):
    """The first operation of a function that went wrong."""

    scope: str
    """The module it belongs to, such as "attn/o"."""
    name: str
    """As JAX calls it, such as "dot_general"."""
    backward: bool
    """Whether it makes a gradient."""
    made: bool
    """Whether all that it was given was finite."""


class Value(NamedTuple):
    """A value on its way through a function."""

    array: Any
    lost: bool
    """Whether it is not finite, and not on purpose: a mask's minus infinity is a constant of the function."""


class Found(Exception):
    """Ends the search."""


def first_lost(function: Callable[..., Any], *arguments: Any) -> Operation | None:
    """The first operation of a call whose result is not finite, because it made it so or because of what it
    was given; None if there is none."""
    closed = jax.make_jaxpr(function)(*arguments)
    given = [Value(x, not is_finite(x)) for x in jax.tree.leaves(arguments)]
    try:
        _evaluate(closed.jaxpr, [*(Value(x, False) for x in closed.consts), *given], "")
    except Found as found:
        return found.args[0]
    return None


def _evaluate(jaxpr: Any, arguments: Sequence[Value], scope: str) -> list[Value]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))

    def read(name: Any) -> Value:
        return Value(name.val, False) if isinstance(name, Literal) else values[name]

    for equation in jaxpr.eqns:
        inputs = [read(name) for name in equation.invars]
        within = f"{scope}/{equation.source_info.name_stack}"
        params, name = equation.params, equation.primitive.name
        if name in CALLS:
            results = _call(params[CALLS[name]], inputs, within)
        elif name == "scan" and params["length"] == 1:
            fixed, carried = params["num_consts"] + params["num_carry"], params["num_carry"]
            once = [*inputs[:fixed], *(Value(x.array[0], x.lost) for x in inputs[fixed:])]
            results = _call(params["jaxpr"], once, within)
            results = [*results[:carried], *(Value(y.array[None], y.lost) for y in results[carried:])]
        else:
            results = list(_apply(equation, inputs, within))
        values.update(zip(equation.outvars, results, strict=True))
    return [read(name) for name in jaxpr.outvars]


def _call(called: Any, inputs: list[Value], scope: str) -> list[Value]:
    consts = [Value(x, False) for x in getattr(called, "consts", ())]
    return _evaluate(getattr(called, "jaxpr", called), [*consts, *inputs], scope)


def _apply(equation: Any, inputs: list[Value], scope: str) -> Iterator[Value]:
    arrays = [x.array for x in inputs]
    results = equation.primitive.bind(*arrays, **equation.params)
    results = results if equation.primitive.multiple_results else [results]
    if not all(map(is_finite, results)):
        made = all(map(is_finite, arrays))
        if made or any(x.lost for x in inputs):
            # "transpose(jvp(attn))/q" is how JAX calls the gradient of attn/q.
            names = re.sub(r"\w+\(|\)", "", scope).split("/")
            plain = "/".join(name for name in names if name)
            raise Found(Operation(plain, equation.primitive.name, "transpose(" in scope, made))
    return (Value(y, False) for y in results)


def is_finite(x: Any) -> bool:
    """Whether all of an array is finite; what is no float is."""
    is_float = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return not is_float or bool(np.isfinite(np.asarray(x)).all())  # on the host: nothing to compile
