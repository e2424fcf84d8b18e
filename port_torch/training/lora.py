"""LoRA (core/lora.py) in the mirror: linear maps of the layers get two narrow matrices each.

The maps themselves, embeddings, norms and head stay as they are. An adapted map is another module than
`nn.Linear`, whose output and not whose weight counts; port_torch.model.Attention knows that. Its parameters
have the names that `peft` gives them, but nothing here imports it: that takes longer than PyTorch itself.
Dropout draws from PyTorch's generator, as the decoder's own does: `seed_dropout` of step.py makes every
update's masks a function of its step.
"""

import math

import torch
from torch import Tensor, nn

from core.extras import require_peft
from core.lora import LoraConfig
from port_torch.model import Decoder, leaf_of

BASE, LORA = ".base_layer", ".lora_"  # in the names of an adapted map's parameters
ADAPTER = "default"  # the adapter's name there


class Adapted(nn.Module):
    """W x + alpha / rank * B A dropout(x), W and its bias as they were."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        """A is drawn from PyTorch's generator, evenly from +-1 / sqrt(in), as peft does; B is zero."""
        super().__init__()
        self.base_layer = base
        self.lora_dropout = nn.Dropout(config.dropout)
        a = nn.Linear(base.in_features, config.rank, bias=False)
        b = nn.Linear(config.rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        nn.init.zeros_(b.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({ADAPTER: a}), nn.ModuleDict({ADAPTER: b})
        self.scale = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        return self.base_layer(x) + b(a(self.lora_dropout(x))) * self.scale

    def delta(self) -> Tensor:
        """What merging adds to W."""
        return self.lora_B[ADAPTER].weight @ self.lora_A[ADAPTER].weight * self.scale


def add_adapters(decoder: Decoder, config: LoraConfig, seed: int) -> None:
    """Puts adapters into the decoder, which compute nothing yet, and leaves only them to be trained.

    Args:
        seed: of the first matrix of each; the second is zero.

    Raises:
        UserError: the model lacks a map that the settings name, or peft is not installed, which opens the
            result.
    """
    require_peft()
    targets = config.targets(decoder.config)
    decoder.requires_grad_(False)
    torch.manual_seed(seed)
    for name, module in list(decoder.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in targets and isinstance(module, nn.Linear):
            setattr(decoder.get_submodule(parent), child, Adapted(module, config))


def adapters_of(decoder: Decoder) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] of each adapted map, by its name in transformers; float32, on CPU."""
    found = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Adapted):
            _, layer, *_ = name.split(".")
            pair = (matrix[ADAPTER].weight.detach() for matrix in (module.lora_A, module.lora_B))
            a, b = (weight.to("cpu", torch.float32) for weight in pair)
            found[leaf_of(f"{name}.weight").exported.format(layer)] = a, b
    return found


def base_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The parameters by the names of a plain decoder, without adapters."""
    return {name.replace(BASE, ""): p.detach() for name, p in decoder.named_parameters() if LORA not in name}


@torch.no_grad()
def merged(decoder: Decoder) -> dict[str, Tensor]:
    """The parameters by the names of a plain decoder, what the adapters add included; nothing is changed."""
    weights = base_weights(decoder)
    for name, module in decoder.named_modules():
        if isinstance(module, Adapted):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.delta()
    return weights
