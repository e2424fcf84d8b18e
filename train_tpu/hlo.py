"""Reading a compiled module: what runs, how often, and what it multiplies, moves and sends.

XLA's own `cost_analysis` counts the body of a loop once, knows nothing of what a custom kernel does, and
does not tell HBM from the memory on the chip. So the text of the compiled, scheduled module is walked
instead: every instruction that runs, times the trips of the loops around it.

Bytes are those of HBM. A fusion reads each operand once and writes its results once, as XLA's own model has
it: of an operand that it only slices, the slice; of a result updated in place, the update. An array takes
what its layout takes (64 lanes are padded to the 128 of a tile), and one that the compiler put into the
chip's own memory (`S(1)` in its layout) costs nothing. Caches and overlap are not modelled.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

BITS = {"pred": 8, "token": 0, "bf16": 16} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64) if kind != "f" or bits > 8
}
FLOAT8 = re.compile(r"f8e\w+")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
               "collective-broadcast", "ragged-all-to-all")  # fmt: skip
HOST_OPCODES = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")
# Instructions that move nothing: names for what is there, and the ends of what began elsewhere.
FREE = frozenset((
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional",
    "copy-done", "slice-done", "after-all", "partition-id", "replica-id", "opt-barrier", "domain",
    "all-reduce-done", "all-gather-done", "collective-permute-done", "async-done", "async-update",
))  # fmt: skip
COPIES = ("copy", "bitcast", "copy-start", "copy-done")  # what has the value of its operand
# Roots of the fusions in which a collective begins and ends that runs beside others; those carry it, too.
ASYNC_START, ASYNC_DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
FREE_CUSTOM_CALLS = ("ConcatBitcast", "AssumeGatherIndicesInBound", "AllocateBuffer")
KERNEL = "tpu_custom_call"  # a Pallas (Mosaic) kernel


class Array(NamedTuple):
    """An array as it lies in memory."""

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    """With the padding of its tiles."""
    on_chip: bool
    """In the chip's vector or scalar memory, not in HBM."""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def hbm(self) -> int:
        """Bytes of HBM that it takes."""
        return 0 if self.on_chip else self.bytes


class Instruction(NamedTuple):
    """A line of a computation, as the module's text has it."""

    name: str
    opcode: str
    outputs: tuple[Array, ...]
    """One, or the leaves of a tuple."""
    operands: tuple[str, ...]
    literal: str
    """What stands in the parentheses: of a constant its value, of a parameter its number."""
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of `name=...`, without quotes."""
        found = re.search(rf'\b{name}=(?:"([^"]*)"|%?([^\s,]+))', self.attributes)
        return (found.group(1) or found.group(2)) if found else None

    def attribute_of_backend(self, name: str) -> str | None:
        """A value of the backend's configuration, which is JSON with strings as numbers."""
        found = re.search(rf'"{name}":"([^"]*)"', self.attributes)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        """Where in the program it comes from, as JAX wrote it down."""
        return self.attribute("op_name") or ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.attribute("custom_call_target") or ""

    @property
    def results(self) -> tuple[Array, ...]:
        """What it computes; the beginning of an exchange puts out its operands before that, flags behind."""
        if self.opcode in ("all-gather-start", "collective-permute-start"):
            return self.outputs[len(self.operands) : 2 * len(self.operands)]
        return self.outputs

    @property
    def hbm(self) -> int:
        return sum(array.hbm for array in self.results)


class Computation:
    """A list of instructions in the order they run, and ways to look into it."""

    def __init__(self, name: str, instructions: list[Instruction]):
        self.name = name
        self.instructions = instructions
        self.by_name = {i.name: i for i in instructions}
        self.root = next(i for i in instructions if i.root)

    def origin(self, name: str) -> Instruction:
        """What an instruction is at most a copy of."""
        instruction = self.by_name[name]
        while instruction.opcode in COPIES:
            instruction = self.by_name[instruction.operands[0]]
        return instruction

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in set(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions if i.opcode == "parameter"}


class Executed(NamedTuple):
    """An instruction outside all fusions, with the computation it stands in and how often a step runs it."""

    instruction: Instruction
    computation: Computation
    times: int


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str
    groups: str
    """Which devices take part, as the module says it."""
    group_size: int
    times: int
    """How often a step runs it."""
    elements: int
    """Of its results on a chip, each time."""
    bytes: int
    """That these take."""
    dtypes: tuple[str, ...]
    op_name: str


class Module:
    """A compiled module."""

    def __init__(self, text: str):
        self.header, _, body = text.partition("\n")
        self.computations, self.entry = _parse(body)

    @property
    def n_aliased(self) -> int:
        """Outputs that are written into the memory of an input."""
        start = self.header.find("input_output_alias=")
        if start < 0:
            return 0
        listed = self.header[start : self.header.find(", entry", start)]
        return listed.count("-alias)")

    def executed(self) -> Iterator[Executed]:
        """Every instruction that a step runs, those of loop bodies with their number of trips."""
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: Computation, times: int) -> Iterator[Executed]:
        for instruction in computation.instructions:
            yield Executed(instruction, computation, times)
            if instruction.opcode == "while":
                body = self.computations[instruction.attribute("body")]
                yield from self._walk(body, times * self.trips(instruction, computation))
            elif instruction.opcode in ("call", "async-start"):
                called = instruction.attribute("to_apply") or instruction.attribute("calls")
                yield from self._walk(self.computations[called], times)
            _require(instruction.opcode != "conditional", f"how often does {instruction.name} run?")

    def trips(self, loop: Instruction, computation: Computation) -> int:
        """How often a counted loop runs: read from where it starts, its step and its condition.

        XLA:TPU leaves no trip count in the module; a `lax.scan` is `for (i = 0; i < n; i += 1)`.
        """
        condition = self.computations[loop.attribute("condition")]
        body = self.computations[loop.attribute("body")]
        start = computation.by_name[loop.operands[0]]

        def element(instruction: Instruction, within: Computation) -> int:
            _require(instruction.opcode == "get-tuple-element", instruction)
            _require(within.by_name[instruction.operands[0]].opcode == "parameter", instruction)
            return int(instruction.attribute("index"))

        def value(name: str, within: Computation) -> int:
            instruction = within.origin(name)
            if instruction.opcode == "constant":
                return int(instruction.literal)
            if within is condition or within is body:  # it is carried along unchanged
                return value(start.operands[element(instruction, within)], computation)
            raise AssertionError(f"{loop.name}: {instruction} is no constant")

        compare = condition.root
        _require(compare.opcode == "compare" and compare.attribute("direction") == "LT", compare)
        counter = element(condition.by_name[compare.operands[0]], condition)
        first = value(start.operands[counter], computation)
        last = value(compare.operands[1], condition)
        step = self._step(body, counter, value)
        return max(0, -(-(last - first) // step))

    def _step(self, body: Computation, counter: int, value) -> int:
        """What a loop adds to its counter each time."""
        update = body.origin(body.root.operands[counter])
        if update.opcode == "fusion":
            inner = self.computations[update.attribute("calls")]
            update = inner.root
            _require(update.opcode == "add", update)
            constants = [inner.by_name[o] for o in update.operands if inner.by_name[o].opcode == "constant"]
            _require(len(constants) == 1, update)
            return int(constants[0].literal)
        _require(update.opcode == "add", update)
        return value(update.operands[1], body)

    # --- what an instruction costs ---

    def hbm_bytes(self, instruction: Instruction, within: Computation) -> int:
        """Bytes of HBM read and written by one run of an instruction, custom kernels' rereading apart."""
        opcode = instruction.opcode
        if opcode in FREE or instruction.target in FREE_CUSTOM_CALLS:
            return 0
        operands = [within.by_name[name] for name in instruction.operands]
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        if opcode == "copy-start":  # to, from, semaphore
            return sum(array.hbm for array in instruction.outputs[:2])
        if opcode == "slice-start":
            to = instruction.outputs[-2]
            return (0 if operands[0].outputs[0].on_chip else to.bytes) + to.hbm
        if opcode == "dynamic-update-slice":
            update = operands[1].outputs[0]
            return update.hbm + (0 if instruction.outputs[0].on_chip else update.bytes)
        if opcode in ("dynamic-slice", "slice", "gather"):
            result = instruction.outputs[0]
            return (0 if operands[0].outputs[0].on_chip else result.bytes) + result.hbm
        return instruction.hbm + sum(operand.hbm for operand in operands)

    def _fusion_bytes(self, fusion: Instruction, operands: list[Instruction]) -> int:
        inner = self.computations[fusion.attribute("calls")]
        if inner.root.target == ASYNC_DONE:
            return 0
        if inner.root.target == ASYNC_START:  # to operands, results, flags
            results = fusion.outputs[len(operands) : 2 * len(operands)]
            return sum(array.hbm for array in results) + sum(operand.hbm for operand in operands)
        total = 0
        for number, operand in enumerate(operands):
            if not operand.outputs[0].on_chip:
                total += min(operand.hbm, self._read(inner, number))
        roots = [inner.root]
        if inner.root.opcode == "tuple":
            roots = [inner.by_name[name] for name in inner.root.operands]
        for root, output in zip(roots, fusion.outputs, strict=True):
            if not output.on_chip:
                total += min(output.bytes, self._written(inner, root, output.bytes))
        return total

    def _read(self, inner: Computation, number: int) -> int:
        """Bytes that a fused computation reads of one of its parameters."""
        parameter = inner.parameters[number]
        whole = sum(array.bytes for array in parameter.outputs)
        total = 0
        pending = [parameter]
        while pending:
            used = pending.pop()
            for user in inner.users.get(used.name, ()):
                sliced = user.operands[0] == used.name and used.name not in user.operands[1:]
                if user.opcode == "bitcast":
                    pending.append(user)
                elif user.opcode in ("dynamic-slice", "slice", "gather") and sliced:
                    total += sum(array.bytes for array in user.outputs)
                elif user.opcode == "dynamic-update-slice" and sliced:
                    pass  # updated in place
                elif user.opcode in ("tuple", *COLLECTIVES):
                    pass  # handed on where it lies; what is exchanged is counted where that begins
                elif user.opcode == "fusion":
                    called = self.computations[user.attribute("calls")]
                    places = [n for n, name in enumerate(user.operands) if name == used.name]
                    total += sum(self._read(called, n) for n in places)
                else:
                    return whole
        return min(total, whole)

    def _written(self, inner: Computation, root: Instruction, whole: int) -> int:
        """Bytes that a fused computation writes of one of its results."""
        while root.opcode == "bitcast":
            root = inner.by_name[root.operands[0]]
        if root.opcode in ("parameter", *COLLECTIVES):
            return 0  # as in `_read`
        if root.opcode == "dynamic-update-slice":
            return sum(array.bytes for array in inner.by_name[root.operands[1]].outputs)
        if root.opcode == "fusion":
            called = self.computations[root.attribute("calls")]
            if called.root.opcode != "tuple":
                return self._written(called, called.root, whole)
        return whole

    def matrix_flops(self, instruction: Instruction, within: Computation) -> int:
        """FLOPs of matrix products in one run of an instruction (2 a multiply and add), fused ones too."""
        if instruction.opcode == "fusion":
            inner = self.computations[instruction.attribute("calls")]
            return sum(self.matrix_flops(i, inner) for i in inner.instructions)
        if instruction.opcode == "convolution":
            return _convolution_flops(
                instruction, *(within.by_name[o].outputs[0] for o in instruction.operands)
            )
        if instruction.opcode == "dot":
            left = within.by_name[instruction.operands[0]].outputs[0]
            contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.attributes).group(1)
            depth = math.prod(left.dims[int(d)] for d in contracted.split(",") if d)
            return 2 * instruction.outputs[0].size * depth
        return 0

    def products(self) -> Iterator[tuple[Instruction, tuple[Array, Array]]]:
        """Every matrix product of the module with its two operands, fused or not, each once."""
        for computation in self.computations.values():
            for instruction in computation.instructions:
                if instruction.opcode in ("convolution", "dot"):
                    left, right = (computation.by_name[o].outputs[0] for o in instruction.operands[:2])
                    yield instruction, (left, right)

    def arrays(self) -> Iterator[Array]:
        """Every array that is held in memory: results of the instructions outside fusions."""
        for executed in self.executed():
            yield from executed.instruction.outputs

    def host_transfers(self) -> list[str]:
        """Instructions that talk to the host: infeeds, outfeeds, sends, callbacks."""
        return [
            i.name
            for computation in self.computations.values()
            for i in computation.instructions
            if i.opcode in HOST_OPCODES or "callback" in i.target.lower() or "host" in i.target.lower()
        ]

    def collectives(self, n_devices: int) -> list[Collective]:
        found = []
        for instruction, _, times in self.executed():
            if instruction.opcode == "fusion":
                inner = self.computations[instruction.attribute("calls")]
                if inner.root.target == ASYNC_START:
                    instruction = inner.by_name[inner.root.operands[0]]
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            groups, size = _replica_groups(instruction.attributes, n_devices)
            results = instruction.results
            found.append(
                Collective(
                    kind=kind,
                    groups=groups,
                    group_size=size,
                    times=times,
                    elements=sum(a.size for a in results),
                    bytes=sum(a.size * bits(a.dtype) // 8 for a in results),
                    dtypes=tuple(sorted({a.dtype for a in results})),
                    op_name=instruction.op_name,
                )
            )
        return found

    def kernels(self) -> Iterator[Executed]:
        """The custom kernels (Pallas) that a step runs."""
        return (e for e in self.executed() if e.instruction.target == KERNEL)


def _require(holds: bool, what: Any) -> None:
    """Refuses a form of HLO that this reader does not know: figures read off it would be wrong."""
    if not holds:
        raise AssertionError(f"the compiled program has a form that is not known: {what}")


def bits(dtype: str) -> int:
    """Of one element."""
    return 8 if FLOAT8.fullmatch(dtype) else BITS[dtype]


def _replica_groups(attributes: str, n_devices: int) -> tuple[str, int]:
    """The groups of a collective in the module's words, and how many devices are in one."""
    found = re.search(
        r"replica_groups=(mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}"
        r"|\{(\{[\d,]*\}.*?)?\}|\[(\d+),(\d+)\]<=\S+)",
        attributes,
    )
    if not found:
        pairs = re.search(r"source_target_pairs=(\{.*?\}\})", attributes)
        return (pairs.group(1), _ring(pairs.group(1))) if pairs else ("all", n_devices)
    whole, axes, names, listed, _, per_group = found.groups()
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
        return whole, math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", names))
    if per_group:
        return whole, int(per_group)
    return whole, listed.split("}")[0].count(",") + 1 if listed else n_devices


def _ring(pairs: str) -> int:
    """How many devices of a permutation, {{from,to},...}, hand on to each other."""
    to = dict(re.findall(r"\{(\d+),(\d+)\}", pairs))
    at = next(iter(to))
    ring = {at}
    while (at := to.get(at, at)) not in ring:
        ring.add(at)
    return len(ring)


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> int:
    """A matrix product as XLA:TPU writes it. Batch axes are windows of which one position is valid."""
    labels = instruction.attribute("dim_labels")
    lhs, rest = labels.split("_")
    rhs, out = rest.split("->")
    result = instruction.outputs[0]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}
    spatial = sorted(c for c in out if c.isdigit())

    def numbers(name: str, default: int) -> list[int]:
        return [int(n) for n in fields[name].split("x")] if name in fields else [default] * len(spatial)

    pads = (
        [p.split("_") for p in fields["pad"].split("x")] if "pad" in fields else [("0", "0")] * len(spatial)
    )
    valid = 1
    for axis, stride, dilate, dilate_right, pad in zip(
        spatial, numbers("stride", 1), numbers("lhs_dilate", 1), numbers("rhs_dilate", 1), pads, strict=True
    ):
        extent, taps, places = (
            array.dims[where.index(axis)] for array, where in ((left, lhs), (right, rhs), (result, out))
        )
        spread = (extent - 1) * dilate + 1
        count = 0
        for tap in range(taps):
            for place in range(places):
                at = place * stride + tap * dilate_right - int(pad[0])
                count += 0 <= at < spread and at % dilate == 0
        valid *= count
    features_in = right.dims[rhs.index("i")]
    return 2 * valid * features_in * result.dims[out.index("b")] * result.dims[out.index("f")]


# --- parsing ---

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([0-9,<=]*)\](?:\{([0-9,]*)(?::([^{}]*))?\})?")


def _parse(text: str) -> tuple[dict[str, Computation], Computation]:
    computations: dict[str, Computation] = {}
    entry = name = None
    instructions: list[Instruction] = []
    pending = ""
    for line in re.sub(r"/\*index=\d+\*/", "", text).split("\n"):
        starts = _INSTRUCTION.match(line)
        if pending and (starts or line == "}"):
            instructions.append(_parse_instruction(pending))
            pending = ""
        if header := _COMPUTATION.match(line):
            name, instructions = header.group(2), []
            if header.group(1):
                entry = name
        elif line == "}" and name:
            computations[name] = Computation(name, instructions)
            name = None
        elif name and starts:
            pending = line
        elif pending:
            pending += line
    return computations, computations[entry]


def _parse_instruction(text: str) -> Instruction:
    start = _INSTRUCTION.match(text)
    at = start.end()
    end = _closing(text, at) if text[at] == "(" else text.index(" ", at)
    outputs = tuple(parse_array(m.group()) for m in _ARRAY.finditer(text[at:end]))
    opening = text.index("(", end)
    closing = _closing(text, opening)
    literal = text[opening + 1 : closing - 1]
    opcode = text[end:opening].strip()
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(
        start.group(2), opcode, outputs, operands, literal, text[closing:], bool(start.group(1))
    )


def _closing(text: str, at: int) -> int:
    """The place behind the parenthesis that closes the one at `at`."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise AssertionError(f"no closing parenthesis in {text[:200]}")


def parse_array(text: str) -> Array:
    """`bf16[32,64]{1,0:T(8,128)(2,1)S(1)}`: type, shape, axes from the innermost, tiles, memory space."""
    dtype, dims, order, layout = _ARRAY.fullmatch(text).groups()
    shape = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
    layout = layout or ""
    physical = [shape[int(axis)] for axis in reversed(order.split(","))] if order else list(shape)
    tile = re.search(r"T\(([0-9,]+)\)", layout)
    if tile:
        sizes = [int(n) for n in tile.group(1).split(",")]
        physical = [1] * (len(sizes) - len(physical)) + physical
        for k, size in enumerate(reversed(sizes), start=1):
            physical[-k] = -(-physical[-k] // size) * size
    space = re.search(r"S\((\d+)\)", layout)
    n_bytes = math.prod(physical) * bits(dtype) // 8
    return Array(dtype, shape, n_bytes, on_chip=bool(space) and space.group(1) != "0")
