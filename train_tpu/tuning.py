"""Fine-tuning on the rows of a file: from what the command was given to the `Setup` that is trained."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import Manifest, load_manifest, recorded_hash
from core.checkpoint.steps import find_step, list_steps, tokenizer_carriers
from core.config import ModelConfig
from core.data.row_packing import packed_batches
from core.data.sequences import HeldOut
from core.data.tuning_rows import RowFile
from core.leaves import get_leaf, path_names
from core.model import Params, abstract_params
from core.progress import Activity
from core.run.tuning_data import TuningData, make_tuning_data
from core.sharding import make_mesh, place, replicated, state_shardings
from core.tokenizer import load_tokenizer_of
from core.vocabulary import with_rows
from train_tpu.config import FinetuneConfig, JaxSettings
from train_tpu.report import commands_of_tuned, describe, tuning_rows
from train_tpu.setup import Setup, Source, begin, find_devices, say_notes, settle, without_process
from train_tpu.step import abstract_trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning(Setup):
    """A run on rows."""

    config: FinetuneConfig
    source: Source
    data: TuningData

    @property
    def defaults(self) -> JaxSettings:
        """See `Setup`."""
        config = self.config
        return FinetuneConfig(init_from=config.init_from, data=config.data, out=config.out)

    @property
    def heldout(self) -> list[HeldOut]:
        """See `Setup`."""
        return self.data.divided.heldout

    @property
    def frozen(self) -> tuple[Params, ...]:
        """See `Setup`."""
        return () if self.step.lora is None else (self.source.params,)

    def open_batches(self, start: int) -> Any:
        """See `Setup`."""
        config = self.config
        return packed_batches(
            self.data.divided.train, seed=config.seed, batch=config.batch, start=start, rows=self.own_rows
        )

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """What the parameters come from."""
        step_dir, old, _ = self.source
        entry = {"operation": "finetune", "path": str(step_dir), "step": old.step, "tokens": old.tokens}
        return [*old.lineage, entry | {"sha256": recorded_hash(step_dir)} | self.data.told]

    def begun(self, manifest: Manifest) -> tuple[Manifest, str]:
        """See `Setup`."""
        what = f"starting a new run in {self.out} from the parameters of {self.source.step_dir}"
        return dataclasses.replace(manifest, lineage=self.lineage), what

    def require_same_source(self, old: Manifest) -> None:
        """See `Setup`."""
        self.require_same_origin(old, self.lineage)

    def commands(self) -> str:
        """See `Setup`."""
        adapted = None if self.step.lora is None else self.config.init_from
        return commands_of_tuned(self.out, self.data.form, self.data.divided.shown[0], adapted)


def prepare_tuning(config: FinetuneConfig, file: RowFile) -> Tuning:
    """Model, data and devices of a run on the rows of a file; nothing is written."""
    out = config.out
    step_dir = find_step(config.init_from)
    manifest = load_manifest(step_dir)
    begin(config)
    shape, kernels, console = find_devices(config, out)
    with Activity("making sequences of the rows", console=console):
        tokenizer = load_tokenizer_of(
            manifest.tokenizer, tokenizer_carriers(step_dir), str(step_dir), config.tokenizer
        )
        old = ModelConfig(**manifest.config["model"])
        data = make_tuning_data(config, file, tokenizer, manifest.chat_template, old)
    mesh, model = make_mesh(shape), data.model
    config, step, attention = settle(config, model, mesh, kernels, data.tokenizer)
    lora = None if config.lora.lora_rank is None else config.lora
    step = dataclasses.replace(step, packed=True, lora=lora)
    n_trained = sum(leaf.size for leaf in jax.tree.leaves(abstract_trained(step)))
    about = tuning_rows(config, data, n_trained)
    table = describe(config, model, about, mesh, step.compute, attention, kernels, by_documents=True)
    table.print(console)
    say_notes(config, model, data.steps, shape, out, console)
    source = Source(step_dir, manifest, None)
    resumes = bool(list_steps(out / "checkpoints"))
    if not config.show_sharding and (lora is not None or not resumes):
        with Activity(f"opening {config.init_from}", console=console):
            known = tokenizer.vocab_size if data.tokenizer.vocab_size > tokenizer.vocab_size else None
            source = source._replace(params=load_params(step_dir, old, model, known, mesh))
    return Tuning(
        config=config, out=out, tokenizer=data.tokenizer, prompts=data.prompts, steps=data.steps, mesh=mesh,
        step=step, record=data.record(without_process(config)), source=source, console=console, data=data,
    )  # fmt: skip


def load_params(
    step_dir: Path, old: ModelConfig, model: ModelConfig, known: int | None, mesh: Mesh
) -> Params:
    """The parameters of a checkpoint, which are of the model `old`, as those of `model`.

    known: where tokens were added, how many there were before; the rows of others are begun anew.
    """
    abstract = abstract_params(old)
    shardings = state_shardings(mesh, abstract)

    def is_vocabulary(path: tuple) -> bool:
        return "vocab" in get_leaf(path_names(path)).axes

    def wanted(path: tuple, leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        where = sharding if known is None or not is_vocabulary(path) else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def grown(path: tuple, leaf: jax.Array, sharding: Any) -> jax.Array:
        if not is_vocabulary(path):
            return leaf
        axis = get_leaf(path_names(path)).axes.index("vocab")
        return place(with_rows(np.asarray(leaf.addressable_data(0)), axis, known, model.vocab_size), sharding)

    params = restore_params(step_dir, jax.tree_util.tree_map_with_path(wanted, abstract, shardings))
    if known is None:
        return params
    return jax.tree_util.tree_map_with_path(grown, params, state_shardings(mesh, abstract_params(model)))
