"""The ops `torch.ops.mtlm.*`: their schemas, plain PyTorch implementations, and which file has the CUDA ones.

Declared at import, so that every op exists everywhere; `load` adds the CUDA implementations of the built
file, or of one compiled on the spot, and says which it is.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core.errors import UserError, os_error
from kernels_cuda import allocate, build, decode_reference, reference

Backend = Literal["auto", "cuda", "torch"]

_SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    "add_rms_norm": "(Tensor residual, Tensor branch, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    "rms_norm_backward": "(Tensor d_normed, Tensor? d_sum, Tensor x, Tensor rstd, Tensor weight, bool branch)"
    " -> (Tensor, Tensor, Tensor)",
    "rotary_": "(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool conjugate) -> ()",
    "rotary_pack": "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool conjugate) -> Tensor",
    "softmax_loss_": "(Tensor(a!) logits, Tensor targets, Tensor(b!) total, Tensor(c!) nll, float z_loss,"
    " bool gradients) -> ()",
    "adamw_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] copies, Tensor lr, Tensor step, Tensor grad_scale, Tensor skip, float beta1, float beta2,"
    " float eps, float weight_decay) -> ()",
}
# One decoding step; all write into what they are given.
_DECODE_SCHEMAS = {
    "decode_embed_": "(Tensor token, Tensor position, Tensor table, Tensor? learned, Tensor(a!) x) -> ()",
    "decode_qkv_": "(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias, Tensor? cos, Tensor? sin,"
    " Tensor position, Tensor(a!) q, Tensor(b!) k_cache, Tensor(c!) v_cache) -> ()",
    "decode_attention_": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor position, Tensor(a!) out) -> ()",
    "decode_add_projection_": "(Tensor a, Tensor weight, Tensor? bias, Tensor(a!) x) -> ()",
    "decode_mlp_": "(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias, bool gated,"
    " Tensor(a!) hidden) -> ()",
    "decode_logits_": "(Tensor x, Tensor norm, float eps, Tensor table, Tensor(a!) logits) -> ()",
    "decode_sample_": "(Tensor logits, Tensor real, Tensor whole, int last, Tensor(a!) position,"
    " Tensor(b!) token) -> ()",
}
# What the built file has for the ops that return new tensors: allocate.py gives them what to write into.
_INTO_SCHEMAS = {
    "rms_norm_into": "(Tensor x, Tensor weight, float eps, Tensor(a!) normed, Tensor(b!) rstd) -> ()",
    "add_rms_norm_into": "(Tensor residual, Tensor branch, Tensor weight, float eps, Tensor(a!) normed,"
    " Tensor(b!) sum, Tensor(c!) rstd) -> ()",
    "rms_norm_partials": "(Tensor x) -> int",
    "rms_norm_backward_into": "(Tensor d_normed, Tensor? d_sum, Tensor x, Tensor rstd, Tensor weight,"
    " Tensor(a!) d_x, Tensor(b!) d_branch, Tensor(c!) d_weight, Tensor(d!) partials) -> ()",
    "rotary_pack_into": "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool conjugate,"
    " Tensor(a!) packed) -> ()",
}
LIBRARY = torch.library.Library("mtlm", "DEF")
for _name, _schema in _INTO_SCHEMAS.items():
    LIBRARY.define(_name + _schema)
for _schemas, _module in ((_SCHEMAS, reference), (_DECODE_SCHEMAS, decode_reference)):
    for _name, _schema in _schemas.items():
        LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        # For every device and type; the CUDA implementations, where they are loaded, come before it.
        LIBRARY.impl(_name, getattr(_module, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("mtlm::rms_norm", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=reference.wide_type(x.dtype))


@torch.library.register_fake("mtlm::add_rms_norm", lib=LIBRARY)
def _(residual: Tensor, branch: Tensor, weight: Tensor, eps: float):
    rstd = residual.new_empty(residual.shape[:-1], dtype=reference.wide_type(residual.dtype))
    return branch.new_empty(branch.shape), residual.new_empty(residual.shape), rstd


@torch.library.register_fake("mtlm::rms_norm_backward", lib=LIBRARY)
def _(d_normed: Tensor, d_sum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor, branch: bool):
    two = branch and d_normed.dtype != x.dtype
    d_branch = d_normed.new_empty(x.shape[0] if two else 0, x.shape[1])
    return x.new_empty(x.shape), d_branch, weight.new_empty(weight.shape)


@torch.library.register_fake("mtlm::rotary_", lib=LIBRARY)
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, conjugate: bool):
    pass


@torch.library.register_fake("mtlm::rotary_pack", lib=LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, conjugate: bool):
    b, s, h, k_size = q.shape
    return q.new_empty(b, s, 3, h, k_size)


@torch.library.register_fake("mtlm::softmax_loss_", lib=LIBRARY)
def _(logits: Tensor, targets: Tensor, total: Tensor, nll: Tensor, z_loss: float, gradients: bool):
    pass


@torch.library.register_fake("mtlm::adamw_", lib=LIBRARY)
def _(
    params, grads, exp_avgs, exp_avg_sqs, copies, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay
):
    pass


def _nothing(*arguments) -> None:
    """What an op gives that only writes into its arguments."""


for _name in _DECODE_SCHEMAS:
    torch.library.register_fake(f"mtlm::{_name}", _nothing, lib=LIBRARY)


@dataclass(frozen=True)
class Source:
    """Where the CUDA implementations come from."""

    file: Path | None
    """None: from nowhere, plain PyTorch runs."""
    reason: str
    """One line: which it is and why."""


_loaded: Source | None = None  # what `load` found, once a process


def kernels_loaded() -> bool:
    """Whether `torch.ops.mtlm` has its CUDA implementations in this process."""
    return _loaded is not None and _loaded.file is not None


def find(compile_missing: bool = True) -> Source:
    """The file to use here: the built one, else one compiled for this GPU and kept, else none.

    Args:
        compile_missing: whether to compile (half a minute, once) where a compiler is; else it is only said.
    """
    if not torch.cuda.is_available():
        why = "PyTorch is built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU is visible"
        return Source(None, f"plain PyTorch, because {why}")
    if torch.__version__ < torch.torch_version.TorchVersion("2.10"):
        return Source(None, f"plain PyTorch, because PyTorch {torch.__version__} is older than 2.10")
    capability = torch.cuda.get_device_capability()
    missing = _why_not(build.BUILT, capability)
    if missing is None:
        return Source(build.BUILT, f"the built file {build.BUILT.name}")
    if capability < (8, 0):
        return Source(
            None, f"plain PyTorch, because the GPU's architecture {capability} is older than (8, 0)"
        )
    kept = build.kept_file(capability)
    if _why_not(kept, capability) is not None:
        if build.find_nvcc() is None:
            return Source(None, f"plain PyTorch, because {missing} and there is no nvcc to compile one")
        if not compile_missing:
            return Source(kept, f"a file to be compiled at first use, because {missing}")
        print(f"compiling the CUDA kernels, because {missing} (about half a minute, once)", file=sys.stderr)
        try:
            build.build_kept(kept, capability)
        except UserError as error:
            return Source(None, f"plain PyTorch, because {missing} and none could be compiled: {error}")
        except OSError as error:
            why = os_error(error) or f"{kept}: {error}"
            return Source(None, f"plain PyTorch, because {missing} and none could be kept: {why}")
    return Source(kept, f"compiled here, because {missing}")


def load(backend: Backend = "auto") -> Source:
    """Makes `torch.ops.mtlm` run on CUDA kernels where it can; says on stderr, once, what will run.

    Args:
        backend: "cuda" must get them; "torch" leaves them; "auto" takes them where they are.

    Raises:
        UserError: "cuda", and there are none to be had.
    """
    global _loaded
    if backend == "torch":
        return Source(None, "plain PyTorch, as asked for")
    if _loaded is None:
        found = find()
        if found.file is not None:
            try:
                torch.ops.load_library(found.file)
                for function in allocate.IMPLEMENTATIONS:
                    LIBRARY.impl(function.__name__, function, "CUDA")
            except OSError as error:
                cause = error.__cause__ or error
                found = Source(None, f"plain PyTorch, because {found.file} does not load: {cause}")
        _loaded = found
        print(f"kernels: {found.reason}", file=sys.stderr)
    if backend == "cuda" and _loaded.file is None:
        raise UserError(
            f"backend cuda is not possible: {_loaded.reason.removeprefix('plain PyTorch, because ')}; "
            "`python -m kernels_cuda.doctor` says more"
        )
    return _loaded


def _why_not(file: Path, capability: tuple[int, int]) -> str | None:
    """Why a built file cannot serve this GPU, None if it can."""
    if not file.exists():
        return "no file is built"
    facts = build.made_of(file)
    if facts is None:
        return f"{file.name} or {file.with_suffix('.json').name} is damaged or unfinished"
    if facts["sources"] != build.sources_hash():
        return f"{file.name} is of other sources"
    if not build.serves(facts["architectures"], capability):
        return f"{file.name} is for {' '.join(facts['architectures'])}, not for {capability}"
    return None
