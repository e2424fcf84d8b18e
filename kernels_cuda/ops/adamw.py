"""AdamW in few launches, with learning rate, clipping and skipping read from the device (csrc/adamw.cu)."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.registry import declare, wide_type


def _untraced(method: Callable[..., None]) -> Callable[..., None]:
    """A method of Optimizer without the wrapper that keeps torch.compile out of it: calling that imports
    torch.compile, 2 s for which a run that compiles nothing would wait."""
    return inspect.unwrap(method)


class AdamW(torch.optim.Optimizer):
    """The updates of torch.optim.AdamW, on parameters of any device.

    A parameter in bfloat16 gets a float32 master, which is updated; the parameter is its rounded copy.
    Learning rate and step counter are tensors on the device: a step waits for nothing, and a CUDA graph that
    records one keeps counting. To change the rate use `set_lr`.

    Args:
        params: tensors, named tensors or groups, as of any optimizer. A group's tensors share a device.
        lr, betas, eps, weight_decay: as torch.optim.AdamW has them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any optimizer; a group added later begins at step 0.

        Raises:
            ValueError: its settings make no AdamW.
        """
        _untraced(torch.optim.Optimizer.add_param_group)(self, param_group)
        group = self.param_groups[-1]
        lr, betas, eps, weight_decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
        if not (lr >= 0 and all(0 < beta < 1 for beta in betas) and eps >= 0 and weight_decay >= 0):
            del self.param_groups[-1]
            raise ValueError(
                f"lr {lr}, betas {betas}, eps {eps} and weight_decay {weight_decay} are not valid for AdamW"
            )
        for p in group["params"]:
            self._prepare(p)
        device = _device(group)
        group["lr"] = torch.tensor(float(lr), device=device)
        group["step"] = torch.zeros((), device=device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimizer."""
        _untraced(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def set_lr(self, lr: float) -> None:
        """The learning rate of every group from the next step on."""
        for group in self.param_groups:
            group["lr"].fill_(lr)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        grad_scale: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: makes the gradients first, and its loss is returned, as of any optimizer.
            grad_scale: one float32 on the device that multiplies the gradients, such as
                `clip_scale(norm, max_norm)`.
            skip: one bool on the device; where it is true nothing changes, the step counter neither.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            device = params[0].device
            scale = torch.ones((), device=device) if grad_scale is None else grad_scale
            skipped = torch.zeros((), dtype=torch.bool, device=device) if skip is None else skip
            group["step"] += ~skipped
            for narrow in (True, False):
                chosen = [p for p in params if ("master" in self.state[p]) is narrow]
                states = [self.state[p] for p in chosen]
                torch.ops.mtlm.adamw_(
                    [s["master"] for s in states] if narrow else chosen,
                    [p.grad.contiguous() for p in chosen],
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    chosen if narrow else [],
                    group["lr"],
                    group["step"],
                    scale,
                    skipped,
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in any optimizer; the state stays float32, whatever the parameters' type."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for name, value in state_dict["state"][number].items():
                self.state[p][name] = value.to(p.device, copy=True)
        for group in self.param_groups:
            device = _device(group)
            for name in ("lr", "step"):
                group[name] = torch.as_tensor(group[name], dtype=torch.float32).to(device, copy=True)

    def _prepare(self, p: Tensor) -> None:
        """State at its start; there from the beginning, so that a graph can be captured at any step."""
        wide = wide_type(p.dtype)
        state = self.state[p]
        state["exp_avg"] = torch.zeros_like(p, dtype=wide, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if p.dtype != wide:
            state["master"] = p.detach().to(wide, copy=True, memory_format=torch.contiguous_format)


def _device(group: dict[str, Any]) -> torch.device:
    """Where a group's tensors are; of an empty group nothing ever is."""
    return group["params"][0].device if group["params"] else torch.device("cpu")


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What takes gradients of this global norm down to `max_norm`; at most 1 (torch's clip_grad_norm_)."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0).float()


@declare(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] copies, Tensor lr, Tensor step, Tensor grad_scale, Tensor skip, float beta1, float beta2,"
    " float eps, float weight_decay) -> ()"
)
def _adamw_plain(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One update of AdamW (Loshchilov and Hutter 2019) in place, number `step` counted from 1."""
    # 1 - beta^step in float64: float32's 1 - 0.9999 is off by 1.7e-4 of itself.
    correction1, correction2 = (-torch.expm1(step.double() * math.log(beta)) for beta in (beta1, beta2))
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = g.to(p.dtype) * grad_scale
        new_m = m + (1 - beta1) * (g - m)
        new_v = beta2 * v + (1 - beta2) * g * g
        new_p = p * (1 - lr * weight_decay) - lr / correction1 * new_m / ((new_v / correction2).sqrt() + eps)
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(torch.where(skip, old, new))
        if copies:
            copies[i].copy_(p)
