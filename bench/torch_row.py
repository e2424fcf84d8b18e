"""What holds in a process that times PyTorch: what the row's name says runs, or the row fails."""

import torch
from torch import nn

from bench.row_process import Row


def refuse_fallbacks(cuda: bool) -> None:
    """Turns two of PyTorch's silent fallbacks into errors, for the rest of this process.

    Code of which torch.compile has made eight versions runs uncompiled from then on; and on a GPU, attention
    that no fused kernel serves is computed by the formula, with all scores in memory.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if cuda:
        torch.backends.cuda.enable_math_sdp(False)


def compiled_facts() -> Row:
    """How many graphs torch.compile has made in this process, and how often it had to break one."""
    from torch._dynamo.utils import counters  # slow

    breaks = sum(counters["graph_break"].values())
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}


def require_liger(model: nn.Module, loss: bool) -> None:
    """A ValueError where Liger has changed none of a model's modules; with `loss`, also where it has not
    changed the model's own call, which computes the loss."""
    of_model, *of_modules = (
        getattr(module.forward, "__module__", "").startswith("liger_kernel") for module in model.modules()
    )
    if not any(of_modules) or (loss and not of_model):
        raise ValueError(f"Liger has not changed {type(model).__name__}: the row would be timed without it")
