"""Opening a folder of weights that came from somewhere: `config.json` and safetensors, and nothing else.

`transformers` loads folders laxly: changed bytes, missing and surplus tensors load with at most a warning,
and an index is followed wherever it points. Here the manifest is checked first where there is one, no path
leaves the folder, no pickle is opened, and a tensor that holds NaN or infinity is refused when it is read.
"""

import hashlib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from core.checkpoint.manifest import EXPORT_MANIFEST, Manifest, load_manifest, verify
from core.errors import UserError
from core.hub_models import CONFIG, INDEX, LICENSE, OTHERS, PICKLES, WEIGHTS, is_content_of

EXPORT_FORMAT = "mtlm-export"
"""What the lineage calls an export of ours that was imported."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class TensorInfo(NamedTuple):
    """What a safetensors file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    """float32, bfloat16 or float16."""
    file: Path


class Folder(NamedTuple):
    """An opened folder. Its tensors are read one at a time, so that memory stays that of one."""

    path: Path
    config: dict[str, Any]
    """What config.json says."""
    tensors: dict[str, TensorInfo]
    manifest: Manifest | None
    """Ours, verified; None for a folder from elsewhere."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own type, on the CPU; a UserError if it holds NaN or infinity."""
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            _refuse_file(file, error)
        require_finite(tensor, name, file)
        return tensor

    def read_float32(self, name: str) -> np.ndarray:
        """A tensor as float32, which holds every value of the narrower types exactly."""
        return self.read(name).float().numpy()

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """A UserError naming the first tensor that is missing, not expected, or of another shape."""
        require_tensors(self.path, {name: info.shape for name, info in self.tensors.items()}, expected)


def open_folder(path: Path) -> Folder:
    """Opens a folder without reading its weights, but for the hashes of ours.

    Raises:
        UserError: it is no such folder, it was changed, one of its paths leads out of it, or its weights are
            pickled or quantized.
    """
    if not path.is_dir():
        raise UserError(f"{path} is {'a file' if path.exists() else 'not there'}: give a folder")
    require_own_files(path)
    manifest = export_manifest(path)
    if manifest:
        verify(path, EXPORT_MANIFEST)
    if not (path / CONFIG).exists():
        raise UserError(f"{path} has no {CONFIG}: give a folder in Hugging Face format")
    config = read_json(path, CONFIG)
    tensors: dict[str, TensorInfo] = {}
    for file, names in _weight_files(path).items():
        found = read_header(inside(path, file))
        for name in found:
            if name in tensors:
                raise UserError(f"{name} is in {file} and in {tensors[name].file}: remove one of them")
        if names is not None:
            require_tensors(path / file, dict.fromkeys(found, ()), dict.fromkeys(names, ()))
        tensors |= found
    return Folder(path, config, tensors, manifest)


def require_tensors(
    where: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares names and shapes; a UserError names the first tensor that differs, and how many more do."""
    differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if not differing:
        return
    name = differing[0]
    if name not in found:
        problem = f"lacks the tensor {name}"
    elif name not in expected:
        problem = f"holds the tensor {name}, which this model does not have"
    else:
        problem = f"holds {name} of shape {list(found[name])} where {list(expected[name])} is expected"
    more = f" ({len(differing) - 1} more tensors differ)" if len(differing) > 1 else ""
    raise UserError(f"{where} {problem}{more}: it is damaged or of another model")


def export_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, not verified, if it is an export of ours."""
    return load_manifest(folder, EXPORT_MANIFEST) if (folder / EXPORT_MANIFEST).exists() else None


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a safetensors file that others may read, as the files next to it; the library writes it for its
    owner alone."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def weights_hash(folder: Path, verified: Manifest | None = None) -> str:
    """One sha256 of all files of weights of a folder.

    verified: the folder's manifest, if the files were just compared with it: they are not read again.
    """
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        if verified is not None and path.name in verified.files:
            whole.update(bytes.fromhex(verified.files[path.name]["sha256"]))
            continue
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def require_finite(tensor: torch.Tensor, name: str, where: Path) -> None:
    """A UserError if a tensor is of another type than those read here, or holds NaN or infinity."""
    require_type(str(tensor.dtype).removeprefix("torch."), name, where)
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} in {where} has NaN or infinite values: these weights are unusable")


def require_type(dtype: str, name: str, where: Path) -> None:
    """A UserError if a tensor's type is none of those that are read, which float32 holds exactly."""
    if dtype not in DTYPES.values():
        raise UserError(f"{name} in {where} is of type {dtype}: only {', '.join(DTYPES.values())} are read")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the folder; a UserError where there is none."""
    file = inside(folder, name)
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): copy it again from its source") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object: copy it again from its source")
    return content


def _weight_files(folder: Path) -> dict[str, list[str] | None]:
    """Name of each file of weights -> the tensors that the index says it holds; None without an index."""
    single, index = (folder / WEIGHTS).exists(), (folder / INDEX).exists()
    if single and index:
        raise UserError(f"{folder} holds both {WEIGHTS} and {INDEX}, which may differ: remove one of them")
    if single:
        return {WEIGHTS: None}
    if not index:
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{folder} holds its weights as {pickles[0]}, a pickle, which can run arbitrary code when "
                f"opened, so it is not opened: ask its author for {WEIGHTS}"
            )
        raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    placed = read_json(folder, INDEX).get("weight_map")
    if not (isinstance(placed, dict) and placed and all(isinstance(file, str) for file in placed.values())):
        raise UserError(f"{folder / INDEX} has no weight_map of tensor names to file names")
    files: dict[str, list[str] | None] = {}
    for name, file in placed.items():
        files.setdefault(file, []).append(name)
    return files


def inside(folder: Path, name: str) -> Path:
    """The file of that name, which must lie in the folder itself, by name and after every link, or, of a
    snapshot in the cache of the Hugging Face Hub, among the cache's contents.

    Raises:
        UserError: it lies elsewhere, or the name is none that a file can have.
    """
    file = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{folder} names the file {name!r}, which lies outside of it: it is not opened")
    try:
        target = file.resolve()
        there = target.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, links in a circle
        raise UserError(
            f"{folder} names the file {reprlib.repr(name)}, which cannot be opened ({error})"
        ) from None
    if not (target.is_relative_to(folder.resolve()) or is_content_of(folder, target)):
        raise UserError(
            f"{file} is a link to {target}, outside of its folder, and not opened: give a folder of real "
            f"files (`hf download REPOSITORY --local-dir FOLDER`, or `cp -rL` to copy this one)"
        )
    if there and not target.is_file():
        raise UserError(f"{file} is not a file: copy the folder again from its source")
    return file


def require_own_files(folder: Path) -> None:
    """A UserError if a file that is read by its name, whoever reads it, lies elsewhere (`inside`)."""
    for name in (CONFIG, *OTHERS):
        if name != LICENSE:  # not read
            inside(folder, name)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file; their values stay on the disk.

    Raises:
        UserError: it is damaged, or holds a type that is not read.
    """
    tensors: dict[str, TensorInfo] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is not a dict)
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    how = "as they were before they were quantized"
                    if part.get_dtype() == "F64":
                        how = "after converting them to float32"
                    raise UserError(
                        f"{name} in {file} is of type {part.get_dtype()}: only float32, bfloat16 and "
                        f"float16 are read; give the weights {how}"
                    )
                tensors[name] = TensorInfo(tuple(part.get_shape()), DTYPES[part.get_dtype()], file)
    except (SafetensorError, OSError) as error:
        _refuse_file(file, error)
    return tensors


def _refuse_file(file: Path, error: Exception) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise UserError(f"{file} is missing: copy the folder again from its source") from None
    raise UserError(
        f"{file} is not a whole safetensors file ({error}): copy it again from its source"
    ) from error
