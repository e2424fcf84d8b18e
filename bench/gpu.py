"""What a benchmark of GPUs says where there is none."""

from core.errors import UserError


def require_gpu(command: str, instead: str = "") -> None:
    """A UserError where PyTorch finds no GPU.

    instead: options with which the command runs on a CPU, if there are any.
    """
    import torch  # slow

    if not torch.cuda.is_available():
        tried = f": {instead} tries the command out" if instead else ""
        raise UserError(f"{command} needs an NVIDIA GPU, and PyTorch finds none here{tried}")
