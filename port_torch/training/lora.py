"""LoRA (Hu et al. 2021) with the `peft` library: every linear map of the layers gets two narrow matrices.

The maps themselves, embeddings, norms and head stay as they are. An adapted map is another module than
`nn.Linear`, whose output and not whose weight counts; port_torch.model.Attention knows that.
"""

import torch
from torch import Tensor

from core.errors import UserError
from core.extras import install_command
from core.leaves import LEAVES
from port_torch.model import Decoder

MAPS = [leaf.module.rpartition("/")[2] for leaf in LEAVES if leaf.is_layer_kernel]
BASE, LORA = ".base_layer", ".lora_"  # in the names of an adapted map's parameters


def add_adapters(decoder: Decoder, rank: int, alpha: float, seed: int) -> None:
    """Puts adapters into the decoder, which compute nothing yet, and leaves only them to be trained.

    Args:
        rank: width of the two matrices.
        alpha: what their product is multiplied by, divided by the rank.
        seed: of the first matrix; the second is zero.

    Raises:
        UserError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(f"LoRA needs peft: {install_command('torch')}") from None
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=MAPS), decoder)


@torch.no_grad()
def merged(decoder: Decoder) -> dict[str, Tensor]:
    """The parameters by the names of a plain decoder, what the adapters add included; nothing is changed."""
    weights = {
        name.replace(BASE, ""): p.detach() for name, p in decoder.named_parameters() if LORA not in name
    }
    for name, module in decoder.named_modules():
        if hasattr(module, "get_delta_weight"):
            key = f"{name}.weight"
            weights[key] = weights[key] + module.get_delta_weight("default")
    return weights
