"""Opening LoRA adapters as `peft` saves them: a folder of adapter_config.json and adapter_model.safetensors.

Next to those of ours (adapter_export.py) lies a manifest (core/checkpoint/manifest.py): the SHA-256 of every
file, and of the base's weights.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from core.checkpoint.manifest import EXPORT_MANIFEST, Manifest, verify
from core.config import ModelConfig
from core.errors import UserError
from core.extras import require_peft
from core.folder_kinds import ADAPTER_CONFIG as CONFIG
from core.hub_models import PICKLES, local, origin
from port_torch.folder import (
    export_manifest,
    inside,
    read_header,
    read_json,
    require_finite,
    require_own_files,
    require_tensors,
    weights_hash,
)
from port_torch.hf_config import STOCK, hf_config, stock_type

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # that peft puts before the names of the class of transformers
BASE_HASH = "base_sha256"  # of the lineage's last entry
OPERATION = "finetune"  # of the entry that has the base's hash in older adapters


class Adapter(NamedTuple):
    """An opened folder of adapters."""

    path: Path
    config: dict[str, Any]
    """What adapter_config.json says."""
    manifest: Manifest | None
    """Ours, verified; None for adapters from elsewhere."""

    @property
    def base_hash(self) -> str | None:
        """Of the weights that it was trained on, as `weights_hash` gives it; None: not recorded."""
        lineage = self.manifest.lineage if self.manifest else []
        for entry in reversed(lineage):
            if found := entry.get(BASE_HASH) or (entry["operation"] == OPERATION and entry.get("sha256")):
                return found
        return None

    @property
    def base_name(self) -> str:
        """What adapter_config.json calls the base; empty if it does not say."""
        return self.config.get("base_model_name_or_path") or ""


def open_adapter(path: Path) -> Adapter:
    """Opens a folder of adapters, of ours or of peft, without reading its weights but for the hashes of ours.

    Raises:
        UserError: it is no such folder, was changed, holds another kind of adapters, or a pickle.
    """
    if not path.is_dir():
        raise UserError(f"{path} is {'a file' if path.exists() else 'not there'}: give a folder of adapters")
    if not (path / CONFIG).exists():
        raise UserError(f"{path} has no {CONFIG}: give a folder of adapters, such as a LoRA run's `adapter`")
    require_own_files(path)
    manifest = export_manifest(path)
    if manifest:
        verify(path, EXPORT_MANIFEST)
    config = read_json(path, CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path} holds adapters of the kind {config.get('peft_type')!r}: only LORA is merged")
    if not (path / WEIGHTS).exists():
        pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLES)
        what = f"only {pickles[0]}, a pickle, which is not opened" if pickles else f"no {WEIGHTS}"
        raise UserError(f"{path} holds {what}: copy it again, or save it as safetensors")
    return Adapter(path, config, manifest)


def find_base(adapter: Adapter, given: Path | None) -> Path:
    """The folder of weights that the adapters are for: as given, else as they name it.

    Raises:
        UserError: they name none that is there, or it has other weights than they were trained on.
    """
    named = adapter.base_name
    if given is None and not named:
        raise UserError(f"{adapter.path} does not name its base: give it with --base")
    if given is None and not Path(named).is_dir():
        if named.count("/") != 1 or named.startswith(("/", ".")):  # no name on the Hub
            raise UserError(f"the base of {adapter.path}, {named}, is not there: give it with --base")
        revision = adapter.config.get("revision")
        given = Path(f"hf:{named}" + (f"@{revision}" if revision else ""))
    base = local(Path(named) if given is None else given)
    expected = adapter.base_hash
    if expected is not None and weights_hash(base) != expected:
        raise UserError(
            f"{adapter.path} was trained on other weights than those of {base}: give the folder that it was "
            f"trained on ({named or 'not named'}, sha256 {expected[:16]}...), unchanged, with --base"
        )
    return base


def doubt(adapter: Adapter, base: Path) -> str | None:
    """What cannot be known of adapters without a record of their base's weights, in words."""
    if adapter.base_hash is not None:
        return None
    name = origin(base) or str(base)
    return (
        f"note: {adapter.path} has no hash of the weights that it was trained on, which it calls "
        f"{adapter.base_name!r}: that they are those of {name} is shown by names and shapes alone"
    )


def transformers_model(model: ModelConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """The class of transformers that an export of the model is opened as, float32, with these tensors.

    weights: by their exported names.
    """
    import transformers  # slow

    from port_torch.hf.modeling_mtlm import MtlmForCausalLM

    stock = stock_type(model)
    kind = getattr(transformers, STOCK[stock]) if stock else MtlmForCausalLM
    made = kind(kind.config_class(**hf_config(model, None, 0, "float32"))).eval()
    missing, unexpected = made.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if model.tied else set()):
        raise ValueError(f"{kind.__name__} has not the tensors of an export: {missing}, {unexpected}")
    return made


def with_adapter(base: nn.Module, path: Path) -> nn.Module:
    """The model of transformers with the adapters of a folder, as peft opens them.

    Raises:
        UserError: peft is not installed, or the adapters are damaged or of another model.
    """
    require_peft()
    import peft  # slow: longer than PyTorch itself

    tensors = read_header(inside(path, WEIGHTS))
    with safe_open(path / WEIGHTS, framework="pt") as opened:
        for name in tensors:
            require_finite(opened.get_tensor(name), name, path / WEIGHTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors, which are refused below
            model = peft.PeftModel.from_pretrained(base, str(path))
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{path} does not fit its base, by what peft says: {' '.join(lines[:2])}") from error
    expected = {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(model).items()}
    require_tensors(path / WEIGHTS, {name: info.shape for name, info in tensors.items()}, expected)
    return model.eval()
