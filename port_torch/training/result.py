"""What a run ends in: a Hugging Face folder, read back and compared with the model that was trained.

Of a LoRA run that is the merged model; the adapters alone lie in another folder, as peft opens them.
"""

import contextlib
import dataclasses
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.checkpoint.manifest import EXPORT_MANIFEST, Manifest, load_manifest, verify
from core.checkpoint.steps import set_aside
from core.errors import UserError
from core.folder_kinds import RESULT
from core.folders import new_folder
from port_torch.card import held_out_scores, model_card
from port_torch.export import disk_errors, write_rest, write_weights
from port_torch.model import parameter_name
from port_torch.names import exported_tensors
from port_torch.training.lora import adapters_of, base_weights, merged
from port_torch.training.setup import Job

ADAPTER = "adapter"
"""Where the adapters of a LoRA run lie."""


def write_result(job: Job, step_dir: Path, manifest: Manifest) -> Path:
    """Writes the model, adapters merged, and of a LoRA run the adapters into the run folder, where they are
    not there yet; returns the path of the model.

    An older one, of a run that was continued, is removed first: its checkpoint was trained further. One that
    lacks a file or was changed is set aside, which is said on stderr.

    manifest: of the checkpoint `step_dir`, which the job's decoder holds.
    """
    if job.lora is not None:
        renew(job.out / ADAPTER, manifest, lambda partial: write_adapters(partial, job, manifest))
    folder = job.out / RESULT
    renew(folder, manifest, lambda partial: write_model(partial, job, step_dir, manifest))
    return folder


def renew(folder: Path, manifest: Manifest, write: Callable[[Path], None]) -> None:
    """Has a folder written, under a hidden name, unless it is there and whole and of the manifest's step."""
    damage = why_damaged(folder) if folder.exists() else None
    if damage:
        aside = set_aside(folder)
        print(
            f"{damage}; it is {aside.name} now, and is written again from step {manifest.step}",
            file=sys.stderr,
        )
    elif folder.exists():
        if load_manifest(folder, EXPORT_MANIFEST).step == manifest.step:
            return
        shutil.rmtree(folder)
    with new_folder(folder) as partial, disk_errors(folder):
        partial.mkdir()
        write(partial)


def live_logits(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and the logits of the model that was trained, so that a fault of the merging shows, too."""
    from port_torch.parity import probe_tokens  # slow: transformers, which training does not need

    decoder = job.decoder.eval()
    tokens = probe_tokens(decoder.config, job.tokenizer.prefix)
    with torch.inference_mode():
        hidden = decoder(torch.from_numpy(tokens).to(decoder.table.device))
        return tokens, decoder.logits(hidden).cpu().numpy()


def write_model(folder: Path, job: Job, step_dir: Path, manifest: Manifest) -> None:
    """Writes the trained model, and compares what is read back with it."""
    from port_torch.parity import compare

    tokens, expected = live_logits(job)
    model = job.decoder.config
    weights: dict[str, Tensor] = merged(job.decoder)
    tree = write_weights(folder, model, lambda leaf: weights[parameter_name(leaf)], "float32")
    scores = held_out_scores(step_dir, manifest.step)
    card = model_card(job.out.name, model, manifest, scores, job.tokenizer)
    write_rest(folder, model, job.tokenizer, exported(manifest, tree), "float32", card)
    with contextlib.redirect_stdout(io.StringIO()):
        compare(folder, model, tokens, expected, "the trained model")


def write_adapters(folder: Path, job: Job, manifest: Manifest) -> None:
    """Writes the adapters with the tokenizer, and compares what peft makes of them with the trained model."""
    from port_torch.adapter_export import Trained, write_adapter

    decoder, model, frozen = job.decoder, job.decoder.config, base_weights(job.decoder)
    weights = {name: frozen[parameter_name(place)].cpu() for name, place in exported_tensors(model).items()}
    trained = Trained(
        model, job.lora, adapters_of(decoder), job.config.init_from, job.lineage[-1]["sha256"], weights,
        *live_logits(job), "the trained model",
    )  # fmt: skip
    write_adapter(folder, trained, job.tokenizer, manifest, "export")


def exported(manifest: Manifest, tree: dict[str, dict[str, Any]]) -> Manifest:
    """The manifest of an export of a checkpoint."""
    entry = {"operation": "export", "step": manifest.step, "dtype": "float32"}
    return dataclasses.replace(
        manifest, kind="params", lineage=[*manifest.lineage, entry], tree=tree, files={}
    )


def why_damaged(folder: Path) -> str | None:
    """What a written model lacks or where it was changed; None if it is whole."""
    try:
        verify(folder, EXPORT_MANIFEST)
    except UserError as error:
        return str(error)
    return None
