"""Samples of a model that is being trained, on the decoding kernels where they compute it.

The kernels read bfloat16 weights and know no adapters. So they get a copy of the model, adapters merged,
which is renewed before every sample; the graphs that were captured for it stay (port_torch/decode.py). It
takes two bytes per parameter, where training takes sixteen.
"""

import functools
import sys

import torch

from core.sampling import Sampling
from kernels_cuda.library import Backend
from port_torch.decode import Generator
from port_torch.model import Decoder, decoder_of
from port_torch.sampling import choose_generator, stream
from port_torch.training.lora import merged
from port_torch.training.step import TrainStep


class Sampler:
    """Samples from one model, whatever its weights are at the time."""

    def __init__(self, train_step: TrainStep, kernels: Backend):
        """kernels: "torch" for plain PyTorch whatever there is."""
        self._train_step, self._kernels = train_step, kernels

    def sample(self, prompts: list[list[int]], sampling: Sampling, n: int, eos: int) -> list[list[int]]:
        """At most `n` new tokens for every prompt."""
        if self._generator is None:
            columns = list(stream(self._train_step.decoder.eval(), prompts, sampling, n, eos))
        else:
            self._renew(self._generator.model)
            columns = list(self._generator.stream(prompts, sampling, n, eos))
        return [[id for id in row if id is not None] for row in zip(*columns, strict=True)]

    @functools.cached_property
    def _generator(self) -> Generator | None:
        """The kernels' generator, or None for plain PyTorch; says which on stderr, once a run."""
        decoder = self._train_step.decoder
        if self._kernels == "torch" or not self._train_step.bf16:
            return None
        try:
            weights = {name: weight.to(torch.bfloat16) for name, weight in merged(decoder).items()}
            generator = choose_generator(decoder_of(decoder.config, weights).eval(), "auto")
        except torch.OutOfMemoryError:
            print("samples: plain PyTorch, because a copy of the model does not fit", file=sys.stderr)
            return None
        if generator is not None:
            print("samples: the decoding kernels", file=sys.stderr)
        return generator

    @torch.no_grad()
    def _renew(self, copy: Decoder) -> None:
        weights = merged(self._train_step.decoder)
        for name, p in copy.named_parameters():
            p.copy_(weights[name])
