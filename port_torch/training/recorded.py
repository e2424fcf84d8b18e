"""A function of GPU tensors recorded as a CUDA graph: one launch instead of a thousand from Python."""

import collections
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from port_torch.decode import capture_stream

WARM_UP = 2
"""Calls before the one that is recorded: they load, and may compile, what cannot be during a recording."""

Inputs = tuple[Tensor | None, ...]
Shapes = tuple[torch.Size | None, ...]


class Recording(NamedTuple):
    """A CUDA graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    output: Tensor

    def replay(self, inputs: Inputs) -> Tensor:
        """What the function gives for these inputs; the tensor is the caller's."""
        for held, given in zip(self.inputs, inputs, strict=True):
            if held is not None:
                held.copy_(given)
        self.graph.replay()
        return self.output.clone()


class Recorded:
    """`function(*inputs)` on one GPU, replayed from its third call with inputs of the same shapes on.

    The function waits for nothing, calls no other device (but by NCCL), and finds all it needs but its inputs
    at the same addresses in every call. Nothing that it makes outlives a call but what it gives: neither
    gradients and casts of weights, whose memory is the graph's, nor a graph of autograd, whose accumulators
    belong to the stream of the call that made them. Random numbers continue those of the default generator,
    as in a plain call. The recordings, one for each shapes of inputs, keep the memory that the largest needs.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self._function = function
        self._calls: collections.Counter[Shapes] = collections.Counter()
        self._recordings: dict[Shapes, Recording] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """What the function gives; the tensor is the caller's."""
        shapes = tuple(None if tensor is None else tensor.shape for tensor in inputs)
        if shapes not in self._recordings:
            self._calls[shapes] += 1
            if self._calls[shapes] <= WARM_UP:
                return self._function(*inputs)
            self._recordings[shapes] = self._record(inputs)
        return self._recordings[shapes].replay(inputs)

    def forget(self) -> None:
        """Gives up all recordings and their memory."""
        self._recordings.clear()
        self._calls.clear()

    def _record(self, inputs: Inputs) -> Recording:
        held = tuple(None if given is None else given.clone() for given in inputs)
        graph = torch.cuda.CUDAGraph()
        # One is replayed at a time and gives nothing away, so all can use the same memory.
        pool = next((recording.graph.pool() for recording in self._recordings.values()), None)
        device = next(given.device for given in inputs if given is not None)
        # On a stream of the inputs' device: PyTorch's own capture stream is of the device that was current at
        # the process's first capture, and records nothing of another. Only this thread's calls can spoil it:
        # others may prepare batches meanwhile.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(
                graph, pool=pool, stream=capture_stream(device), capture_error_mode="thread_local"
            ),
        ):
            output = self._function(*held)
        return Recording(graph, held, output)
