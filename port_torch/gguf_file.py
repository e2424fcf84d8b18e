"""A folder's model as one GGUF file: what port_torch.gguf does.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the names of tensors and keys are
those of the package `gguf`. Tensors are read, reordered, rounded and written one at a time.

llama.cpp's Llama rotates a head's neighbouring elements (2i, 2i + 1), as Meta's code does; transformers and
our models rotate (i, i + half). So the rows of a Llama's queries and keys change places. llama.cpp's Qwen2
and Qwen3 rotate as ours.
"""

import math
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import gguf
import numpy as np
import yaml
from huggingface_hub import metadata_load

from core.chat import folder_template
from core.config import ModelConfig
from core.errors import UserError
from core.folders import require_space, whole_file
from core.hub_models import origin, parse_hub_name
from core.progress import Activity
from core.rope import KINDS
from core.tokenizer import Tokenizer
from port_torch.folder import inside
from port_torch.folder_tokenizer import folder_tokenizer
from port_torch.gguf_tokenizer import Vocabulary, gguf_vocabulary, stop_tokens
from port_torch.hf_config import STOCK, stock_type
from port_torch.model_folder import ModelFolder, open_model

if TYPE_CHECKING:
    from port_torch.gguf import GgufConfig

Type = gguf.GGMLQuantizationType
FILE_TYPES = {
    Type.F32: gguf.LlamaFileType.ALL_F32,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
LARGEST = {Type.F16: 65504.0, Type.Q8_0: 127 * 65504.0}
"""The largest weight that a type has: a block of q8_0 is whole numbers up to 127 times a float16."""
ROTATED = ("layers/attn/q", "layers/attn/k")
ROPE_FREQS = "rope_freqs.weight"
CARD_HEADER = re.compile(r"\A\s*---\n.*?\n---[ \t]*(?:\n|\Z)", re.DOTALL)
"""The YAML of a card, whose comments look like headings of Markdown."""


class Planned(NamedTuple):
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    type: Type
    source: str | None
    """The folder's tensor; None for `ROPE_FREQS`, which is computed."""
    interleaved: bool
    """Whether its rows change places."""

    @property
    def n_bytes(self) -> int:
        """In the file, scales included."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


def write_gguf(config: "GgufConfig") -> None:
    """Writes the file, and says what it holds and how to run it.

    Args:
        config: the command's settings, checked.

    Raises:
        UserError: the folder is damaged, or llama.cpp does not compute its model or its token ids.
    """
    folder, out = config.folder, config.out.absolute()
    opened = open_model(folder)
    model, matrices = opened.config, Type[config.type.upper()]
    architecture = require_architecture(folder, model)
    tensors = plan(opened, architecture, matrices)
    tokenizer = folder_tokenizer(folder, opened.folder.manifest, config.tokenizer, model.vocab_size)
    vocabulary = gguf_vocabulary(folder, tokenizer, model.vocab_size)
    stops = stop_tokens(folder, tokenizer.eos, model.vocab_size)
    template = folder_template(folder)

    with whole_file(out) as partial:
        require_space(out.parent, sum(tensor.n_bytes for tensor in tensors), "the file takes")
        writer = gguf.GGUFWriter(partial, architecture)
        try:
            add_origin(writer, folder, model.n_params)
            writer.add_file_type(FILE_TYPES[matrices])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_sizes(writer, model)
            add_tokenizer(writer, vocabulary, tokenizer, stops)
            if template is not None:
                writer.add_chat_template(template)
            write_tensors(writer, opened, tensors)
        finally:
            writer.close()
    bits = 8 * sum(tensor.n_bytes for tensor in tensors) / sum(math.prod(tensor.shape) for tensor in tensors)
    print(
        f"wrote {config.out}: {model.n_params:,} parameters as {config.type}, "
        f"{out.stat().st_size / 1e6:,.1f} MB, {bits:.2f} bits per weight; run it with\n"
        f"  {next_command(config.out, template is not None)}"
    )


def next_command(out: Path, chats: bool) -> str:
    """What to type next; a model without a template of conversations continues a text."""
    if chats:
        return shlex.join(["llama-cli", "-m", str(out)])
    # llama-cli only converses, and would make up a template.
    return shlex.join(
        ["llama-completion", "-m", str(out), "-no-cnv", "-p", "This function returns", "-n", "100"]
    )


def require_architecture(folder: Path, model: ModelConfig) -> str:
    """llama.cpp's name for the model's class.

    Raises:
        UserError: it has no such class, or computes it otherwise.
    """
    kind = stock_type(model)
    why = None
    if kind is None:
        parts = {
            "learned positions": model.positions == "learned",
            f"an MLP of the kind {model.mlp}": model.mlp != "swiglu",
            "biases of queries, keys and values next to their norms": model.qk_norm
            and model.positions == "rope",
        }
        why = f"has {' and '.join(part for part, there in parts.items() if there)}"
    elif kind == "qwen2" and model.q_width != model.d_model:
        why = f"is a Qwen2 of width {model.d_model} whose heads are {model.q_width} wide together"
    elif model.rope is not None:
        why = _why_not_scaled(kind, model)
    if why:
        raise UserError(
            f"{folder} {why}, which llama.cpp does not compute: a GGUF file is made of a "
            f"{', '.join(STOCK.values())}"
        )
    return kind


def _why_not_scaled(kind: str, model: ModelConfig) -> str | None:
    """What of the model's scaled rotary positions llama.cpp computes otherwise; None: nothing."""
    scaling = model.rope
    if scaling.kind == "llama3" and kind != "llama":
        return f"is a {STOCK[kind]} with positions scaled by llama3"
    if scaling.kind == "yarn":
        # Its betas, its rounding and its amplitude are fixed.
        defaults = {name: value for name, value in KINDS["yarn"].items() if value is not None}
        changed = [name for name, value in defaults.items() if scaling[name] != value]
        if changed:
            return f"has positions scaled by yarn with a {changed[0]} of its own"
    return None


def plan(opened: ModelFolder, architecture: str, matrices: Type) -> list[Planned]:
    """The tensors of the file in their order. Norms and biases are float32, as llama.cpp has them.

    Raises:
        UserError: rows of a matrix are no whole number of the type's blocks.
    """
    model = opened.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.n_layers)
    block, _ = gguf.GGML_QUANT_SIZES[matrices]
    tensors = []
    if model.rope is not None and model.rope.kind == "llama3":
        tensors.append(Planned(ROPE_FREQS, (model.head_size // 2,), Type.F32, None, False))
    for source, place in opened.leaves.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"the package gguf has no name for {source} of a {architecture}")
        is_matrix = len(place.shape) == 2
        if is_matrix and place.shape[1] % block:
            raise UserError(
                f"{source} has rows of {place.shape[1]} weights, and {matrices.name.lower()} packs {block} "
                "at a time: give --type f16"
            )
        interleaved = architecture == "llama" and place.path.rpartition("/")[0] in ROTATED
        tensors.append(Planned(name, place.shape, matrices if is_matrix else Type.F32, source, interleaved))
    return tensors


def add_origin(writer: gguf.GGUFWriter, folder: Path, n_params: int) -> None:
    """Name, license and base model, as far as the folder's card or its place in the Hub's cache says them."""
    card, file, name = {}, inside(folder, "README.md"), folder.absolute().name
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = CARD_HEADER.sub("", text).splitlines()
        name = next((line[2:].strip() for line in lines if line.startswith("# ")), name)
        try:
            card = metadata_load(file) or {}
        except (ValueError, yaml.YAMLError):
            print(
                f"note: the header of {file} is not YAML, so its license is not in the file", file=sys.stderr
            )
    published = origin(folder)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(parse_hub_name(Path(published)).repository if published else name)
    writer.add_size_label(gguf.size_label(n_params, n_params, 0, 0))
    if isinstance(card.get("license"), str):
        writer.add_license(card["license"])
    bases = card.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    if bases:
        writer.add_base_model_count(len(bases))
    for number, base in enumerate(map(str, bases)):
        writer.add_base_model_name(number, base.rpartition("/")[2])
        writer.add_base_model_repo_url(number, f"https://huggingface.co/{base}")


def add_sizes(writer: gguf.GGUFWriter, model: ModelConfig) -> None:
    """What the model computes."""
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_mlp)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_rope_freq_base(model.rope_theta)
    scaling = model.rope
    if scaling is not None and scaling.kind != "llama3":  # that is a tensor
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling["factor"])
        if scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(round(scaling["original_context"]))


def add_tokenizer(
    writer: gguf.GGUFWriter, vocabulary: Vocabulary, tokenizer: Tokenizer, stops: list[int]
) -> None:
    """The vocabulary and its special tokens. A text begins with `bos` where documents did in training.

    stops: what ends a text besides `eos`.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if tokenizer.bos is not None:
        writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eos)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    writer.add_add_bos_token(tokenizer.bos is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_first)
    for add, number in zip((writer.add_eot_token_id, writer.add_eom_token_id), stops, strict=False):
        add(number)
    for number in stops[2:]:
        print(
            f"note: {vocabulary.tokens[number]}, which ends a text, is left out: GGUF has places for three",
            file=sys.stderr,
        )


def write_tensors(writer: gguf.GGUFWriter, opened: ModelFolder, tensors: list[Planned]) -> None:
    """Writes everything, one tensor in memory at a time.

    Raises:
        UserError: a weight is too large for its type, or the disk is full.
    """
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    model = opened.config
    with Activity("writing", total=sum(tensor.n_bytes for tensor in tensors) / 1e6, unit="MB") as activity:
        for tensor in tensors:
            if tensor.source is None:
                values = 1 / model.rope.multipliers(model.head_size, model.rope_theta)
            else:
                values = opened.folder.read_float32(tensor.source)
            if tensor.interleaved:
                values = interleaved(values, model.head_size)
            try:
                writer.write_tensor_data(encoded(values, tensor))
            except OSError as error:
                if error.errno is not None:
                    raise
                # numpy's own, of a write that was cut short
                raise UserError(
                    f"the disk is full ({error}): free some space and run the command again"
                ) from error
            activity.advance(tensor.n_bytes / 1e6)


def interleaved(values: np.ndarray, head_size: int) -> np.ndarray:
    """The rows of queries or keys, [heads * head_size, ...], with row i + half of each head behind row i."""
    pairs = values.reshape(-1, 2, head_size // 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def encoded(values: np.ndarray, tensor: Planned) -> np.ndarray:
    """The values in the tensor's type.

    Raises:
        UserError: one of them is too large for it.
    """
    largest = max(values.max(), -values.min())
    limit = LARGEST.get(tensor.type, math.inf)
    if largest > limit:
        raise UserError(
            f"{tensor.source} has a weight of {largest:.3g}, and {tensor.type.name.lower()} ends at "
            f"{limit:.0f}: give --type bf16"
        )
    return gguf.quantize(values, tensor.type)
