"""Counts memory traffic, kernels and collectives of a compiled program, from its HLO text.

The compiler's own cost analysis is not available without the device, and counts the body of a loop
once. Here the body counts as often as the loop runs. The traffic follows XLA's cost model: a kernel
reads its operands and writes its result, a slice moves only what is sliced, and an update in place
only what is updated.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

DTYPE_BITS = {"pred": 8, "c64": 64, "c128": 128}  # the names of others give their bits
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing: they name parts of existing arrays, or run on the host.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier add-dependency domain".split()
)
INSIDE = ("while", "call", "conditional")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)')
_CALLED = re.compile(
    r"(?:calls|body|to_apply|called_computations|branch_computations)=\{?%?([^,}\s]+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation that moves `bytes` bytes in each of `count` runs.

    `overlapped` says whether computation runs at the same time.
    """

    kind: str
    bytes: int
    count: int
    overlapped: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Memory traffic, kernels and collectives of one run of a program on one device.

    `open_bytes` is the part of `bytes` that loops of unknown length move.
    """

    bytes: int
    open_bytes: int
    kernels: int
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


def read_traffic(text: str, open_loops: Sequence[int] = (1,)) -> Traffic:
    """Counts the traffic of a program from `compiled.as_text()`.

    Args:
        text: the program.
        open_loops: how often the bodies of loops of unknown length run in all: of those that are
            within no other, then of those that are within one of these, and so on.
    """
    computations = dict(_computations(text))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("no ENTRY computation in the HLO text")
    reader = _Reader(computations, open_loops)
    reader.visit(entry.group(1), 1)
    return Traffic(reader.bytes, reader.open_bytes, reader.kernels, tuple(reader.collectives))


def by_kind(collectives: Sequence[Collective]) -> dict[str, dict]:
    """Returns {kind: {count, bytes, overlapped}}, with the bytes of all runs together."""
    totals: dict[str, dict] = defaultdict(lambda: {"count": 0, "bytes": 0, "overlapped": 0})
    for collective in collectives:
        total = totals[collective.kind]
        total["count"] += collective.count
        total["bytes"] += collective.count * collective.bytes
        total["overlapped"] += collective.count * collective.overlapped
    return dict(totals)


def array_bytes(shape: str) -> int:
    """Returns the bytes of an HLO shape such as `bf16[8,4096]{1,0}`; of a tuple, those of all."""
    return sum(_bytes(dtype, dimensions) for dtype, dimensions in _ARRAY.findall(shape))


def _bytes(dtype: str, dimensions: str) -> int:
    bits = re.search(r"\d+", dtype)
    size = DTYPE_BITS.get(dtype, int(bits.group()) if bits else 0)
    return math.prod(int(n) for n in dimensions.split(",") if n) * size // 8


def _computations(text: str) -> Iterator[tuple[str, list[_Instruction]]]:
    """Yields the name and the instructions of each computation of a program."""
    name, instructions = "", list[_Instruction]()
    for line in text.splitlines():
        if not line.startswith(" ") and (header := _COMPUTATION.match(line)):
            name, instructions = header.group(1), []
        elif line.startswith("}"):
            yield name, instructions
        elif match := _INSTRUCTION.match(line):
            root, label, shape, operation, arguments = match.groups()
            operands, attributes = _split_operands(arguments)
            instructions.append(
                _Instruction(
                    name=label,
                    shape=shape,
                    operation=operation,
                    operands=operands,
                    attributes=attributes,
                    root=bool(root),
                )
            )


def _split_operands(arguments: str) -> tuple[tuple[str, ...], str]:
    """Splits the text after the opening parenthesis into names of operands and attributes."""
    depth = 1
    for i, character in enumerate(arguments):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return tuple(re.findall(r"%([\w.\-]+)", arguments[:i])), arguments[i + 1 :]
    return (), arguments


class _Reader:
    """Adds up the traffic of the computations of a program."""

    def __init__(self, computations: dict[str, list[_Instruction]], open_loops: Sequence[int]):
        self._computations, self._open_loops = computations, open_loops
        self.bytes = self.open_bytes = self.kernels = 0
        self.collectives: list[Collective] = []

    def visit(self, name: str, times: int, depth: int = 0, outside: int = 1) -> None:
        """Counts a computation `times` times.

        It is within `depth` loops of unknown length; `outside` is how often the outermost of them
        is started.
        """
        instructions = self._computations[name]
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for i, instruction in enumerate(instructions):
            operation = instruction.operation
            kind = next((k for k in COLLECTIVES if operation in (k, f"{k}-start")), None)
            if operation in FREE or operation.endswith("-done"):
                continue
            if operation in INSIDE:
                self._enter(instruction, times, depth, outside)
            elif kind:
                sent = _sent(instruction, shapes)
                overlapped = _overlapped(instructions, start=i)
                self.collectives.append(
                    Collective(kind=kind, bytes=sent, count=times, overlapped=overlapped)
                )
            else:
                moved = times * self._kernel_bytes(instruction, shapes)
                self.kernels += times
                self.bytes += moved
                self.open_bytes += moved * (depth == 1)

    def _enter(self, instruction: _Instruction, times: int, depth: int, outside: int) -> None:
        if instruction.operation == "while":
            trips = _TRIPS.search(instruction.attributes)
            if trips:
                times *= int(trips.group(1))
            else:
                outside = outside if depth else times
                known = depth < len(self._open_loops)
                times = outside * self._open_loops[depth] if known else times
                depth += 1
        for called in _CALLED.findall(instruction.attributes):
            self.visit(called, times, depth, outside)

    def _kernel_bytes(self, instruction: _Instruction, shapes: dict[str, str]) -> int:
        """Returns the bytes that a kernel reads and writes."""
        operands = [array_bytes(shapes[name]) for name in instruction.operands]
        if instruction.operation == "dynamic-slice":
            return 2 * array_bytes(instruction.shape)
        if instruction.operation == "dynamic-update-slice":
            return 2 * operands[1]
        called = _CALLED.search(instruction.attributes)
        if instruction.operation.startswith("fusion") and called:
            return self._fusion_bytes(self._computations[called.group(1)], operands)
        return sum(operands) + _result_bytes(instruction.shape)

    def _fusion_bytes(self, body: Sequence[_Instruction], operands: Sequence[int]) -> int:
        by_name = {instruction.name: instruction for instruction in body}
        users: dict[str, list[_Instruction]] = {}
        for instruction in body:
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)
        total = 0
        for instruction in body:
            if instruction.operation == "parameter":
                whole = array_bytes(instruction.shape)
                total += min(whole, _read_of(instruction, users))
        root = next(instruction for instruction in body if instruction.root)
        return total + _written_by(root, by_name)


def _sent(collective: _Instruction, shapes: dict[str, str]) -> int:
    """Returns the bytes of all operands of a collective or of all results, whichever is more."""
    operands = sum(array_bytes(shapes[name]) for name in collective.operands)
    results = array_bytes(collective.shape)
    if collective.operation.endswith("-start") and results > operands:
        results -= operands  # the shape is a tuple of operands and results
    return max(operands, results)


def _read_of(value: _Instruction, users: dict[str, list[_Instruction]]) -> int:
    """Returns the bytes that are read of a fusion's parameter; if it is only sliced, the slices."""
    total = 0
    for user in users.get(value.name, []):
        if user.operation == "bitcast":
            total += _read_of(user, users)
        elif user.operation in ("dynamic-slice", "slice", "gather"):
            total += array_bytes(user.shape)
        elif user.operation == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # updated in place
        else:
            return array_bytes(value.shape)
    return total


def _written_by(root: _Instruction, by_name: dict[str, _Instruction]) -> int:
    """Returns the bytes that a fusion writes."""
    if root.operation == "tuple":
        return sum(_written_by(by_name[name], by_name) for name in root.operands)
    if root.operation == "bitcast":
        return _written_by(by_name[root.operands[0]], by_name)
    if root.operation == "dynamic-update-slice":
        return array_bytes(by_name[root.operands[1]].shape)
    return array_bytes(root.shape)


def _result_bytes(shape: str) -> int:
    """Returns the bytes of a result, without scratch space.

    Library calls return their scratch space as a second result, an array of int8.
    """
    arrays = _ARRAY.findall(shape)
    if len(arrays) > 1:
        arrays = [array for array in arrays if array[0] not in ("s8", "u8")]
    return sum(_bytes(dtype, dimensions) for dtype, dimensions in arrays)


def _overlapped(instructions: Sequence[_Instruction], start: int) -> bool:
    """Returns whether a kernel is scheduled between the start and the end of a collective."""
    name = instructions[start].name
    for instruction in instructions[start + 1 :]:
        if instruction.operation.endswith("-done") and name in instruction.operands:
            return False
        if instruction.operation not in FREE and "-start" not in instruction.operation:
            if instruction.operation.endswith("-done"):
                continue
            return instructions[start].operation.endswith("-start")
    return False
