"""What the splash attention kernels compute and move: the compiler knows neither.

Counted from the kernel's tiles, as its grid runs them: a tile above the diagonal is skipped, one on it is
computed whole, and a block is fetched again whenever its index changes.
"""

import itertools
import re

from train_tpu.hlo import Array, Executed

# Matrix products a tile: forward q k^T and p v; dkv q k^T, do v^T, p^T do and ds^T q; dq q k^T, do v^T, ds k.
PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def splash_cost(kernel: Executed) -> tuple[int, int]:
    """FLOPs of one run of a splash kernel, and the bytes of HBM it reads beyond reading each operand once.

    Raises:
        ValueError: it is another kernel.
    """
    instruction, computation, _ = kernel
    name = next((name for name in PRODUCTS if name in instruction.op_name), None)
    if name is None:
        raise ValueError(f"{instruction.op_name} is no splash attention")
    operands = [computation.by_name[operand].outputs[0] for operand in instruction.operands]
    matrices = [array for array in operands if len(array.dims) == 4 and array.dtype != "f32"]
    statistics = [array for array in operands if len(array.dims) == 4 and array.dtype == "f32"]
    batch, heads, length, head_dim = matrices[0].dims
    block_q, block_kv = _blocks(instruction.attributes, name)
    tiles = [
        (i, j)
        for i in range(length // block_q)
        for j in range(length // block_kv)
        if (i + 1) * block_q > j * block_kv  # not wholly above the diagonal
    ]
    flops = 2 * PRODUCTS[name] * len(tiles) * block_q * block_kv * head_dim * heads * batch
    if name == "splash_mha_dkv":  # for each block of keys, all queries that see it
        visits = [i for i, _ in sorted(tiles, key=lambda tile: (tile[1], tile[0]))]
        inner, block = [matrices[0], matrices[3], *statistics], block_q
    else:
        visits = [j for _, j in tiles]
        inner, block = matrices[1:3], block_kv
    fetched = 1 + sum(a != b for a, b in itertools.pairwise(visits))
    return flops, _again(inner, fetched * block / length)


def _again(arrays: list[Array], times: float) -> int:
    return round(sum(array.hbm for array in arrays) * (times - 1))


def _blocks(attributes: str, name: str) -> tuple[int, int]:
    """Queries and keys a tile, from the metadata that the kernel carries."""
    suffix = {"splash_mha_fwd": "", "splash_mha_dkv": "_dkv", "splash_mha_dq": "_dq"}[name]
    found = [re.search(rf'block_{which}{suffix}\\?": (\d+)', attributes) for which in ("q", "kv")]
    if not all(found):
        raise ValueError(f"{name} does not say its block sizes: {attributes[:500]}")
    return int(found[0].group(1)), int(found[1].group(1))
