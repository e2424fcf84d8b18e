"""The matrix products of Muon in a compiled module, and how many there should be."""

import math
import re

from train_tpu.aot.hlo import Module


def muon_products(module: Module) -> list[tuple[str, float]]:
    """Type and FLOPs of every batch of products on one device that belongs to no gradient."""
    found = []
    for instructions in module.computations.values():
        outputs = {i.name: i.outputs[0] for i in instructions if i.outputs}
        for i in instructions:
            name = re.search(r'op_name="([^"]*)"', i.attributes)
            if i.opcode not in ("dot", "convolution") or re.search(r"jvp|\bloss\b", name[1]):
                continue
            out, one, other = i.outputs[0], *(outputs[operand] for operand in i.operands[:2])
            # Of [n, a, i] and [n, i, b] to [n, a, b]; XLA leaves an n of 1 out.
            n = out.dims[0] if len(out.dims) == 3 else 1
            inner = math.sqrt(one.size * other.size / out.size / n)
            found.append((out.dtype, 2 * out.size * inner))
    return found


def muon_flops(matrices: dict[tuple[int, int], int], n_devices: int) -> float:
    """Of one device's share of so many matrices of each shape (smaller side first), by Jordan's formula:
    x x^T, its square, and a polynomial of both times x, five times."""
    return sum(
        5 * math.ceil(n / n_devices) * (2 * small**3 + 4 * small**2 * large)
        for (small, large), n in matrices.items()
    )
