"""Muon in PyTorch: the rule of train_tpu/muon.py, which says what it is. Nothing waits for the device.

torch.optim.Muon is another rule: its momentum is not corrected for starting at 0, which makes 2 to 3% of an
update. Here parameters of one shape are one batch of products, and of several ranks each computes its share.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.run.schedule import OptimizerConfig
from kernels_cuda.ops.adamw import AdamW
from port_torch.training.distributed import Distributed

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-8
RMS = 0.2


class Muon:
    """Muon for matrices, and an AdamW for the other parameters, as one optimizer.

    `state` and `param_groups` are those of a torch.optim.Optimizer; the matrices are the last group. All of
    it stays where it is, and is updated there: a CUDA graph that records a step keeps counting.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        others: AdamW,
        config: OptimizerConfig,
        ranks: Distributed,
        dtype: torch.dtype,
        compiled: bool,
    ):
        """dtype: of the products. compiled: what is done to each element is one kernel for each matrix."""
        self._others, self._config, self._ranks, self._dtype = others, config, ranks, dtype
        self._lr = torch.tensor(config.lr, device=ranks.device)
        self._count = torch.zeros((), device=ranks.device)
        group = {"params": matrices, "lr": self._lr, "step": self._count}
        self.param_groups: list[dict[str, Any]] = [*others.param_groups, group]
        self.state = dict(others.state) | {p: {"exp_avg": torch.zeros_like(p)} for p in matrices}
        self._alike: dict[torch.Size, list[Tensor]] = {}
        for p in matrices:
            self._alike.setdefault(p.shape, []).append(p)
        wrap: Callable = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._advance, self._apply = wrap(advance), wrap(apply)

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on."""
        self._others.set_lr(lr * self._config.adamw_lr_ratio)
        self._lr.fill_(lr)

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor | None, skip: Tensor, ranks: Distributed | None = None) -> None:
        """One update, of parameters that all have a gradient, on every rank the same.

        Args:
            grad_scale, skip: as those of `AdamW.step`.
            ranks: which rehearse it; default the optimizer's own.
        """
        self._others.step(grad_scale=grad_scale, skip=skip)
        ranks = ranks or self._ranks
        scale = torch.ones((), device=ranks.device) if grad_scale is None else grad_scale
        self._count += ~skip
        beta, decay = self._config.momentum, self._config.weight_decay
        corrections = [(1 - beta ** (self._count.double() + ahead)).float() for ahead in (1, 0)]
        own = []
        for shape, parameters in self._alike.items():
            share = math.ceil(len(parameters) / ranks.size)
            stack = torch.empty(share * ranks.size, *shape, dtype=self._dtype, device=ranks.device)
            stack[len(parameters) :].zero_()
            for p, place in zip(parameters, stack, strict=False):
                self._advance(p.grad, self.state[p]["exp_avg"], place, scale, skip, beta, *corrections)
            own.append(newton_schulz(stack[ranks.rank * share :][:share]))
        for parameters, update in zip(self._alike.values(), ranks.gather(own), strict=True):
            for p, u in zip(parameters, update, strict=False):
                self._apply(p, u, self._lr, skip, decay)


def advance(
    gradient: Tensor,
    momentum: Tensor,
    ahead: Tensor,
    scale: Tensor,
    skip: Tensor,
    beta: float,
    correction_momentum: Tensor,
    correction_gradient: Tensor,
) -> None:
    """Momentum after a gradient, in its place, and into `ahead` Nesterov's look ahead."""
    gradient = gradient * scale
    new = beta * momentum + (1 - beta) * gradient
    ahead.copy_(beta * (new / correction_momentum) + (1 - beta) * (gradient / correction_gradient))
    momentum.copy_(torch.where(skip, momentum, new))


def apply(parameter: Tensor, update: Tensor, lr: Tensor, skip: Tensor, decay: float) -> None:
    """A parameter after an orthogonal update, which is given an RMS of 0.2, in its place."""
    size = RMS * max(parameter.shape) ** 0.5
    new = parameter - lr * (size * update.float() + decay * parameter)
    parameter.copy_(torch.where(skip, parameter, new))


def newton_schulz(x: Tensor) -> Tensor:
    """Of matrices [n, out, in] those with the same singular vectors and singular values of about 1; see
    train_tpu/muon.py. The polynomial is that of the smaller side, on which it is multiplied."""
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = torch.div(x, norm + EPS, out=torch.empty_like(x))
    for _ in range(ITERATIONS):
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        x = torch.bmm(x, polynomial) if tall else torch.bmm(polynomial, x)
    return x
