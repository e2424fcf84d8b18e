"""What a run ends in: a Hugging Face folder, read back and compared with the model that was trained."""

import contextlib
import dataclasses
import io
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoint.manifest import EXPORT_MANIFEST, Manifest, load_manifest, verify
from core.checkpoint.steps import set_aside
from core.errors import UserError
from core.folders import new_folder
from core.tokenizer import Tokenizer
from port_torch.card import Tuning, held_out_scores, model_card
from port_torch.export import disk_errors, write_rest, write_weights
from port_torch.model import Decoder, parameter_name
from port_torch.training.lora import merged

FOLDER = "model"
"""Of a run folder: where the result lies."""


def write_result(
    run: Path,
    step_dir: Path,
    decoder: Decoder,
    tokenizer: Tokenizer,
    manifest: Manifest,
    tuning: Tuning | None,
) -> Path:
    """Writes the model into the run folder, adapters merged, if it is not there yet; returns its path.

    An older one, of a run that was continued, is removed first: its checkpoint was trained further. One that
    lacks a file or was changed is set aside, which is said on stderr.

    manifest: of the checkpoint `step_dir`, which the decoder holds.
    """
    from port_torch.parity import compare, probe_tokens  # slow: transformers, which training does not need

    folder = run / FOLDER
    damage = why_damaged(folder) if folder.exists() else None
    if damage:
        aside = set_aside(folder)
        print(
            f"{damage}; it is {aside.name} now, and is written again from step {manifest.step}",
            file=sys.stderr,
        )
    elif folder.exists():
        if load_manifest(folder, EXPORT_MANIFEST).step == manifest.step:
            return folder
        shutil.rmtree(folder)
    model = decoder.config
    tokens = probe_tokens(model, tokenizer.prefix)
    with torch.inference_mode():
        # What is compared is the live model, so that a fault of the merging shows, too.
        expected = decoder.eval()(torch.from_numpy(tokens).to(decoder.table.device))
        expected = decoder.logits(expected).cpu().numpy()
    weights: dict[str, Tensor] = merged(decoder)
    with new_folder(folder) as partial, disk_errors(folder):
        partial.mkdir()
        tree = write_weights(partial, model, lambda leaf: weights[parameter_name(leaf)], "float32")
        card = model_card(run.name, model, manifest, held_out_scores(step_dir, manifest.step), tuning)
        entry = {"operation": "export", "step": manifest.step, "dtype": "float32"}
        exported = dataclasses.replace(manifest, lineage=[*manifest.lineage, entry], tree=tree)
        write_rest(partial, model, tokenizer, exported, "float32", card)
        with contextlib.redirect_stdout(io.StringIO()):
            compare(partial, model, tokens, expected, "the trained model")
    return folder


def why_damaged(folder: Path) -> str | None:
    """What a written model lacks or where it was changed; None if it is whole."""
    try:
        verify(folder, EXPORT_MANIFEST)
    except UserError as error:
        return str(error)
    return None
