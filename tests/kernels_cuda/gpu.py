"""How a kernel's result is judged: against float64 from the same inputs, beside plain PyTorch's error."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kernels_cuda.registry import HOPPER
from tests.checks import require

POISON = float("nan")


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER


ON_HOPPER = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(), reason="needs compute capability 9.0")]


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same values in float64."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def error(got: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of the exact values."""
    scale = exact.double().pow(2).mean().sqrt().item()
    return (got.double() - exact.double()).pow(2).mean().sqrt().item() / max(scale, 1e-30)


def assert_as_good(
    got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], what: str = ""
) -> None:
    """Every result is finite, of the plain one's type, and has at most twice its error.

    Both round the same exact numbers to the same type, so neither can do better than half a unit in the last
    place; the factor allows for another order of float32 sums. Results that plain PyTorch gets exactly still
    may differ by float32's own rounding, 2^-24 a term, 1e-6 of the whole being far above that.
    """
    for number, (ours, theirs, true) in enumerate(zip(got, plain, exact, strict=True)):
        require(
            ours.shape == true.shape and ours.dtype == theirs.dtype,
            what, number, ours.shape, true.shape, ours.dtype, theirs.dtype,
        )  # fmt: skip
        require(torch.isfinite(ours).all(), what, number, "not finite")
        if true.numel():
            mine, allowed = error(ours, true), 2 * error(theirs, true) + 1e-6
            require(mine <= allowed, f"{what} output {number}: error {mine:.3g} > {allowed:.3g}")


def assert_equal_bits(got: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    for a, b in zip(got, again, strict=True):
        require(a.shape == b.shape and a.dtype == b.dtype, a.shape, b.shape, a.dtype, b.dtype)
        require(torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))), a, b)


class Guarded:
    """Tensors between canaries, full of NaN: what a kernel leaves unwritten or writes beyond is seen."""

    MARGIN = 512  # elements, so that alignment is that of an allocation

    def __init__(self):
        self._made: list[tuple[Tensor, int]] = []

    def like(self, t: Tensor, keep: bool = False) -> Tensor:
        """A contiguous tensor of t's shape and type; `keep` copies its values."""
        whole = torch.full((t.numel() + 2 * self.MARGIN,), 77, dtype=t.dtype, device=t.device)
        inside = whole[self.MARGIN : self.MARGIN + t.numel()].view(t.shape)
        inside.copy_(t) if keep else inside.fill_(POISON)
        self._made.append((whole, t.numel()))
        return inside

    def check(self) -> None:
        for whole, size in self._made:
            require((whole[: self.MARGIN] == 77).all(), "written before the beginning")
            require((whole[self.MARGIN + size :] == 77).all(), "written beyond the end")


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values lying otherwise in memory."""
    if kind == "offset":  # begins 2 or 4 bytes behind a multiple of 16
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)
    if kind == "rows":  # rows further apart than they are long
        return torch.cat([t, t.new_full((*t.shape[:-1], 8), POISON)], dim=-1)[..., : t.shape[-1]]
    if kind == "odd rows":
        return torch.cat([t, t.new_full((*t.shape[:-1], 3), POISON)], dim=-1)[..., : t.shape[-1]]
    if kind == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    require(kind == "plain", kind)
    return t


STRIDES = ("plain", "offset", "rows", "odd rows", "transposed")


def run_twice(function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The results of a function whose two runs must agree to the bit, allocations poisoned in between."""
    first = [t.clone() for t in function()]
    poison_free_memory()
    again = function()
    assert_equal_bits(first, again)
    return first


def fresh_leaves(values: Sequence[Tensor]) -> list[Tensor]:
    """Leaves of the same values: what autograd keeps of a leaf is tied to the stream it was first used on."""
    return [t.detach().requires_grad_() for t in values]


def assert_equal_on_a_stream_and_in_a_graph(step: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """A step gives the same bits on another stream and replayed by a CUDA graph; returns them."""
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = step()
    stream.synchronize()
    assert_equal_bits(on_stream, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.fill_(POISON)
    graph.replay()
    assert_equal_bits(captured, expected)
    return expected


def poison_free_memory() -> None:
    """What is allocated next holds NaN: PyTorch hands freed blocks out again as they are."""
    sizes = 3 * [2**8, 2**14, 2**18, 2**22, 2**24]
    blocks = [torch.full((size,), POISON, device="cuda") for size in sizes]
    torch.cuda.synchronize()
    del blocks
