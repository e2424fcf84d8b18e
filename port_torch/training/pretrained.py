"""What a run starts from: the model of an exported folder, with its tokenizer and its history."""

from pathlib import Path
from typing import Any, NamedTuple

from core.chat import folder_template
from core.hub_models import local, origin
from core.tokenizer import Tokenizer
from port_torch.folder import export_manifest, weights_hash
from port_torch.folder_tokenizer import folder_tokenizer
from port_torch.model import Decoder, load


class Pretrained(NamedTuple):
    """An opened folder."""

    decoder: Decoder
    """On the CPU, float32."""
    tokenizer: Tokenizer
    chat_template: str | None
    """The folder's own."""
    lineage: list[dict[str, Any]]
    """The folder's own, or an import where it is not ours; and this start from it, with its weights' hash."""


def open_pretrained(folder: Path, operation: str, tokenizer: str | None) -> Pretrained:
    """The model of a folder, to be trained.

    Args:
        folder: its path, or its name on the Hugging Face Hub.
        operation: what the lineage calls the start from it.
        tokenizer: what the user says it is; None: the folder's own.

    Raises:
        UserError: the folder or its tokenizer is not what it should be.
    """
    folder = local(folder)
    decoder = load(folder)
    manifest = export_manifest(folder)  # verified by `load`
    found = folder_tokenizer(folder, manifest, tokenizer, decoder.config.vocab_size)
    known = {"path": origin(folder) or str(folder), "sha256": weights_hash(folder, manifest)}
    before = manifest.lineage if manifest else [{"operation": "import"} | known]
    entry = {"operation": operation} | known
    return Pretrained(decoder, found, folder_template(folder), [*before, entry])
