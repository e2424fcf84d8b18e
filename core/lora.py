"""LoRA (Hu et al. 2021): its settings, and which linear maps of the layers get adapters.

An adapted map computes W x + alpha / rank * B A x. W stays as it is; A [rank, in] and B [out, rank] are
trained.
"""

import dataclasses

from core import checks
from core.config import ModelConfig
from core.errors import UserError
from core.leaves import LEAVES, Leaf

_BLOCKS = {"attn": "attention", "mlp": "mlp"}
MAPS: dict[str, Leaf] = {leaf.module.rpartition("/")[2]: leaf for leaf in LEAVES if leaf.is_layer_kernel}
"""Every linear map of the layers by its name: q, k, v, o, gate, up, down."""
GROUPS: dict[str, list[str]] = {
    group: [name for name, leaf in MAPS.items() if f"/{block}/" in leaf.module]
    for block, group in _BLOCKS.items()
} | {"all": list(MAPS)}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters instead of all weights."""

    lora_rank: int | None = None
    """Train LoRA adapters of this rank instead of all weights; 8 to 64 are common."""
    lora_alpha: float | None = None
    """The adapters' output is multiplied by this over the rank. Default: twice the rank."""
    lora_dropout: float | None = None
    """Dropout probability of what the adapters are given, in training. Default: 0."""
    lora_targets: tuple[str, ...] = ("all",)
    """The linear maps with adapters: q, k, v, o, gate, up, down, or attention, mlp or all of them."""

    def __post_init__(self) -> None:
        checks.counts(lora_rank=self.lora_rank)
        checks.positive(lora_alpha=self.lora_alpha)
        checks.below_one(lora_dropout=self.lora_dropout)
        for name in self.lora_targets:
            if name not in MAPS and name not in GROUPS:
                raise UserError(
                    f"--lora-targets names {name!r}, which is no linear map of the layers: give "
                    f"{', '.join(MAPS)}, or {', '.join(GROUPS)}"
                )
        if not self.lora_targets:
            raise UserError(f"--lora-targets names no linear map: give {', '.join(MAPS)}, or leave it out")
        if self.lora_rank is None:
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default:
                    raise UserError(
                        f"{checks.option(field.name)} is a setting of adapters: give --lora-rank with it"
                    )

    @property
    def alpha(self) -> float:
        """What the adapters' output is multiplied by, over the rank."""
        return 2 * self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def rank(self) -> int:
        """The rank, of settings that ask for adapters."""
        if self.lora_rank is None:
            raise ValueError("these settings ask for no adapters")
        return self.lora_rank

    @property
    def dropout(self) -> float:
        """Dropout probability of what the adapters are given."""
        return 0.0 if self.lora_dropout is None else self.lora_dropout

    def targets(self, model: ModelConfig) -> list[str]:
        """The names of the maps that get adapters, in the order of `MAPS`.

        Raises:
            UserError: a map is named that this model does not have.
        """
        present = [name for name, leaf in MAPS.items() if leaf.used(model)]
        for name in self.lora_targets:
            if name in MAPS and name not in present:
                raise UserError(
                    f"--lora-targets names {name!r}, which this model does not have: its MLP is {model.mlp}; "
                    f"it has {', '.join(present)}"
                )
        named = {one for name in self.lora_targets for one in GROUPS.get(name, [name])}
        return [name for name in present if name in named]

    def describe(self, model: ModelConfig) -> str:
        """What is trained, in words; raises as `targets` does."""
        dropout = f", dropout {self.dropout:g}" if self.dropout > 0 else ""
        return f"LoRA adapters of rank {self.rank}{dropout}, at {', '.join(self.targets(model))}"
