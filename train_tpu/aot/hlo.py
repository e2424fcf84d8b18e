"""What a compiled module does besides computing: collectives, donation, host transfers, custom kernels.

JAX's API has memory and FLOPs (`compiled.memory_analysis()`, `compiled.cost_analysis()`). The rest is only in
the module's text, `compiled.as_text()`, which is read as far as that needs. Nothing here is an estimate: the
bytes of an array are those of its shape, and an instruction in a loop is reported with the number of loops
around it, since XLA:TPU leaves no trip counts in the module.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
               "collective-broadcast", "ragged-all-to-all")  # fmt: skip
HOST_OPCODES = ("infeed", "outfeed", "send", "recv")
KERNEL = "tpu_custom_call"  # a Pallas (Mosaic) kernel
# XLA:TPU runs a collective next to other work as a chain of fusions, each with a copy of the instruction. The
# root of the first one calls this.
ASYNC_START = "AsyncCollectiveStart"


class Array(NamedTuple):
    """An array's type and shape, without what its layout pads."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of all elements, those of less than a byte packed."""
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype).group())  # bf16, f8e4m3fn, s4
        return self.size * bits // 8


class Instruction(NamedTuple):
    """One instruction of a computation."""

    name: str
    opcode: str
    outputs: tuple[Array, ...]
    """One, or the leaves of a tuple."""
    operands: tuple[str, ...]
    attributes: str
    """What stands behind the operands; of a kernel without its metadata."""

    def calls(self, *attributes: str) -> list[str]:
        """The computations that these attributes name: `body=%a`, `branch_computations={%a, %b}`."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.attributes)
        return re.findall(r"%([\w.\-]+)", " ".join(map("".join, found)))

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'\bcustom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def results(self) -> tuple[Array, ...]:
        """What it computes; the start of an asynchronous gather or permutation also returns its operands."""
        if self.opcode in ("all-gather-start", "collective-permute-start"):
            return self.outputs[len(self.operands) : 2 * len(self.operands)]
        return self.outputs


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str
    group: int | None
    """Devices that exchange with each other; None for a permutation, which sends from one to another."""
    loops: int
    """Loops around it: 0 runs once per step."""
    elements: int
    """Of its results on one device, each time it runs."""
    bytes: int
    """The same in bytes."""
    dtypes: tuple[str, ...]


class Module:
    """A compiled module."""

    def __init__(self, text: str):
        self.header, _, body = text.partition("\n")
        self.computations: dict[str, list[Instruction]] = {}
        for line in body.split("\n"):
            if found := _COMPUTATION.match(line):
                instructions = self.computations[found.group(2)] = []
                if found.group(1):
                    self.entry = found.group(2)
            elif found := _INSTRUCTION.match(line):
                instructions.append(_instruction(*found.groups()))

    @property
    def n_donated(self) -> int:
        """Outputs that are written into the memory of an input."""
        found = re.search(r"\binput_output_alias=\{(.*?)\}, entry", self.header)
        return found.group(1).count("-alias)") if found else 0

    @property
    def n_loops(self) -> int:
        """Loops that are entered, nested ones each by itself."""
        return sum(i.opcode == "while" for i, _ in self.executed())

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs, fusions as one, with the number of loops around it."""
        yield from self._walk(self.entry, 0)

    def _walk(self, computation: str, loops: int) -> Iterator[tuple[Instruction, int]]:
        for instruction in self.computations[computation]:
            yield instruction, loops
            if instruction.opcode == "while":
                inner, deeper = instruction.calls("body"), loops + 1
            elif instruction.opcode in ("call", "async-start", "conditional"):
                inner, deeper = instruction.calls(*_CALLED), loops
            else:
                continue
            for name in inner:
                yield from self._walk(name, deeper)

    def collectives(self, n_devices: int) -> list[Collective]:
        """Every collective that a step runs on `n_devices`, in the order in which they begin."""
        found = []
        for instruction, loops in self.executed():
            for one in self._started(instruction):
                kind = one.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                found.append(
                    Collective(
                        kind=kind,
                        group=_group(one.attributes, n_devices),
                        loops=loops,
                        elements=sum(array.size for array in one.results),
                        bytes=sum(array.bytes for array in one.results),
                        dtypes=tuple(sorted({array.dtype for array in one.results})),
                    )
                )
        return found

    def _started(self, instruction: Instruction) -> list[Instruction]:
        """The instruction; of a fusion that starts a collective, those inside."""
        if instruction.opcode == "fusion":
            inner = self.computations[instruction.calls("calls")[0]]
            return inner if any(i.target == ASYNC_START for i in inner) else []
        return [instruction]

    def kernels(self) -> list[tuple[str, int]]:
        """Name of every custom kernel that a step runs, and the number of loops around it."""
        return [(re.sub(r"\.\d+$", "", i.name), loops) for i, loops in self.executed() if i.target == KERNEL]

    def host_transfers(self) -> list[str]:
        """Names of the instructions that talk to the host: infeeds, outfeeds, sends, callbacks."""
        return [
            i.name
            for instructions in self.computations.values()
            for i in instructions
            if i.opcode in HOST_OPCODES or re.search("callback|host", i.target, re.IGNORECASE)
        ]


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_CALLED = ("to_apply", "calls", "branch_computations", "true_computation", "false_computation")


def _instruction(name: str, outputs: str, opcode: str, rest: str) -> Instruction:
    operands, _, attributes = rest.partition("), ")
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", outputs)
    return Instruction(
        name,
        opcode,
        tuple(Array(kind, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)) for kind, dims in arrays),
        tuple(re.findall(r"%([\w.\-]+)", operands)),
        attributes,
    )


def _group(attributes: str, n_devices: int) -> int | None:
    """How many devices a collective's groups have.

    Raises:
        ValueError: the groups are written in a form that is not known.
    """
    if "source_target_pairs=" in attributes:
        return None
    if "replica_groups=" not in attributes or "replica_groups={}" in attributes:
        return n_devices
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found.group(1).count(",") + 1
    # Of a mesh, the axes: mesh['x'=4,'y'=2] {'x'}
    if found := re.search(r"replica_groups=mesh\[(.*?)\][^{]* \{('\w+'(?:,'\w+')*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", found.group(2)))
    raise ValueError(f"the groups of a collective have a form that is not known: {attributes[:300]}")
