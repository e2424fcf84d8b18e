"""An adapter merged into its base: what port_torch.merge does."""

import dataclasses
import sys
from pathlib import Path

import torch

from core.chat import folder_template
from core.checkpoint.manifest import Manifest
from core.errors import UserError
from core.folders import new_folder
from core.hub_models import origin
from core.tokenizer import tokenizer_record
from port_torch.adapter import (
    WEIGHTS,
    Adapter,
    doubt,
    find_base,
    open_adapter,
    transformers_model,
    with_adapter,
)
from port_torch.card import model_card
from port_torch.export import disk_errors, write_rest, write_weights
from port_torch.folder import inside, read_header, weights_hash
from port_torch.folder_tokenizer import FILE, folder_tokenizer
from port_torch.model_folder import ModelFolder, open_model
from port_torch.parity import compare, probe_tokens

SHARED = {"embed_tokens", "lm_head"}
"""Modules of transformers' classes that have one matrix where the head is tied."""


def merge(path: Path, out: Path, base: Path | None, tokenizer: str | None) -> None:
    """Writes the merged model as float32, under its name once a model loaded from it computes what peft does
    with the adapter on its base.

    Raises:
        UserError: the adapter is damaged or of another base, or the folder does not compute the same.
    """
    adapter = open_adapter(path)
    folder = find_base(adapter, base)
    opened = open_model(folder)
    model = opened.config
    if note := doubt(adapter, folder):
        print(note, file=sys.stderr)
    holder, manifest = folder, opened.folder.manifest
    if (path / FILE).exists():
        holder, manifest = adapter.path, adapter.manifest
    found = folder_tokenizer(holder, manifest, tokenizer, model.vocab_size)
    weights = {name: opened.folder.read(name).float() for name in opened.leaves}
    tuned, saved = with_adapter(transformers_model(model, weights), path), read_header(inside(path, WEIGHTS))
    tokens = probe_tokens(model, found.prefix)
    with torch.inference_mode():
        expected = tuned(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    merged = tuned.merge_and_unload().state_dict()
    names = {place: name for name, place in opened.leaves.items()}
    with new_folder(out) as partial, disk_errors(out):
        partial.mkdir(parents=True)
        tree = write_weights(partial, model, lambda place: merged[names[place]], "float32")
        exported = dataclasses.replace(
            merged_manifest(adapter, opened), tokenizer=tokenizer_record(found), tree=tree,
            chat_template=folder_template(holder),
        )  # fmt: skip
        card = model_card(out.name, model, exported, [], found)
        write_rest(partial, model, found, exported, "float32", card)
        try:
            compare(partial, model, tokens, expected, "peft")
        except UserError as error:
            if model.tied and (changed := SHARED & {part for name in saved for part in name.split(".")}):
                raise UserError(
                    f"{path} changes {' and '.join(sorted(changed))}, and in {origin(folder) or folder} "
                    "embedding and head are one matrix, which cannot be both: train adapters without it"
                ) from error
            raise
    print(f"wrote and checked {out}: {path} merged into {origin(folder) or folder}")


def merged_manifest(adapter: Adapter, base: ModelFolder) -> Manifest:
    """The manifest of the merged model: that of the run that trained the adapter, if it is ours, else what is
    known of the base."""
    entry = {"operation": "merge", "path": str(adapter.path), "sha256": weights_hash(adapter.path)}
    if adapter.manifest:
        return dataclasses.replace(adapter.manifest, lineage=[*adapter.manifest.lineage, entry])
    path, manifest = base.folder.path, base.folder.manifest
    entry["base"] = origin(path) or path.name
    if manifest:
        return dataclasses.replace(manifest, lineage=[*manifest.lineage, entry])
    start = {"operation": "import", "path": origin(path) or str(path), "sha256": weights_hash(path)}
    return Manifest(
        kind="params", step=0, sequences=0, tokens=0, config={"model": dataclasses.asdict(base.config)},
        tokenizer={}, data=None, lineage=[start, entry],
    )  # fmt: skip
