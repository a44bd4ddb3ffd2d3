"""What a compiled program moves: memory traffic, kernels and collectives, read from its HLO text.

The compiler's own cost analysis is not available without the device, and counts the body of a
loop once. Here a loop counts as often as it runs. The traffic is what XLA's cost model takes: a
kernel reads its operands and writes its result, of a slice only what is sliced, of an update in
place only what is updated.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

DTYPE_BITS = {"pred": 8, "c64": 64, "c128": 128}  # others end in their number of bits
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# These move nothing: names for parts of what is there already, or host-side bookkeeping.
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
    """A collective operation: `bytes` each time, `count` times; `overlapped` with computation."""

    kind: str
    bytes: int
    count: int
    overlapped: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one run of a program on one device; `open_bytes` are those of loops of unknown length."""

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


def read_traffic(text: str, open_loops: int = 1) -> Traffic:
    """Reads `compiled.as_text()`; a loop of unknown length is taken to run `open_loops` times."""
    computations = dict(_computations(text))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("no ENTRY computation in the HLO text")
    reader = _Reader(computations, open_loops)
    reader.visit(entry.group(1), 1)
    return Traffic(reader.bytes, reader.open_bytes, reader.kernels, tuple(reader.collectives))


def by_kind(collectives: Sequence[Collective]) -> dict[str, dict]:
    """Returns {kind: {count, bytes, overlapped}}, with the bytes of all runs together."""
    found: dict[str, dict] = defaultdict(lambda: {"count": 0, "bytes": 0, "overlapped": 0})
    for one in collectives:
        entry = found[one.kind]
        entry["count"] += one.count
        entry["bytes"] += one.count * one.bytes
        entry["overlapped"] += one.count * one.overlapped
    return dict(found)


def array_bytes(shape: str) -> int:
    """Bytes of an HLO shape such as `bf16[8,4096]{1,0}`, or of all arrays of a tuple."""
    return sum(_bytes(*found) for found in _ARRAY.findall(shape))


def _bytes(dtype: str, dimensions: str) -> int:
    bits = re.search(r"\d+", dtype)
    size = DTYPE_BITS.get(dtype, int(bits.group()) if bits else 0)
    return math.prod(int(n) for n in dimensions.split(",") if n) * size // 8


def _computations(text: str) -> Iterator[tuple[str, list[_Instruction]]]:
    name, instructions = "", list[_Instruction]()
    for line in text.splitlines():
        if not line.startswith(" ") and (header := _COMPUTATION.match(line)):
            name, instructions = header.group(1), []
        elif line.startswith("}"):
            yield name, instructions
        elif found := _INSTRUCTION.match(line):
            root, label, shape, operation, rest = found.groups()
            operands, attributes = _split_operands(rest)
            instructions.append(
                _Instruction(label, shape, operation, operands, attributes, bool(root))
            )


def _split_operands(rest: str) -> tuple[tuple[str, ...], str]:
    """(the names between the parentheses, what stands behind them)."""
    depth = 1
    for at, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return tuple(re.findall(r"%([\w.\-]+)", rest[:at])), rest[at + 1 :]
    return (), rest


class _Reader:
    def __init__(self, computations: dict[str, list[_Instruction]], open_loops: int):
        self._computations, self._open_loops = computations, open_loops
        self.bytes = self.open_bytes = self.kernels = 0
        self.collectives: list[Collective] = []

    def visit(self, name: str, times: int, is_open: bool = False) -> None:
        instructions = self._computations[name]
        shapes = {i.name: i.shape for i in instructions}
        for at, instruction in enumerate(instructions):
            operation = instruction.operation
            kind = next((k for k in COLLECTIVES if operation in (k, f"{k}-start")), None)
            if operation in FREE or operation.endswith("-done"):
                continue
            if operation in INSIDE:
                self._enter(instruction, times, is_open)
            elif kind:
                sent = _sent(instruction, shapes)
                overlapped = _overlapped(instructions, at)
                self.collectives.append(Collective(kind, sent, times, overlapped))
            else:
                moved = times * self._kernel_bytes(instruction, shapes)
                self.kernels += times
                self.bytes += moved
                self.open_bytes += moved * is_open

    def _enter(self, instruction: _Instruction, times: int, is_open: bool) -> None:
        if instruction.operation == "while":
            found = _TRIPS.search(instruction.attributes)
            times *= int(found.group(1)) if found else self._open_loops
            is_open = is_open or not found
        for called in _CALLED.findall(instruction.attributes):
            self.visit(called, times, is_open)

    def _kernel_bytes(self, instruction: _Instruction, shapes: dict[str, str]) -> int:
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
        by_name = {i.name: i for i in body}
        users: dict[str, list[_Instruction]] = {}
        for instruction in body:
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)
        total = 0
        for instruction in body:
            if instruction.operation == "parameter":
                whole = array_bytes(instruction.shape)
                total += min(whole, _read_of(instruction, users))
        root = next(i for i in body if i.root)
        return total + _written_by(root, by_name)


def _sent(collective: _Instruction, shapes: dict[str, str]) -> int:
    """Bytes of all that it combines: its operands or its results, whichever is more."""
    given = sum(array_bytes(shapes[name]) for name in collective.operands)
    made = array_bytes(collective.shape)
    if collective.operation.endswith("-start") and made > given:
        made -= given  # its result is a tuple of operands and results
    return max(given, made)


def _read_of(value: _Instruction, users: dict[str, list[_Instruction]]) -> int:
    """Bytes of a fusion's parameter that are read: only the slices, where only slices are taken."""
    total = 0
    for user in users.get(value.name, []):
        if user.operation == "bitcast":
            total += _read_of(user, users)
        elif user.operation in ("dynamic-slice", "slice", "gather"):
            total += array_bytes(user.shape)
        elif user.operation == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # in place
        else:
            return array_bytes(value.shape)
    return total


def _written_by(root: _Instruction, by_name: dict[str, _Instruction]) -> int:
    if root.operation == "tuple":
        return sum(_written_by(by_name[name], by_name) for name in root.operands)
    if root.operation == "bitcast":
        return _written_by(by_name[root.operands[0]], by_name)
    if root.operation == "dynamic-update-slice":
        return array_bytes(by_name[root.operands[1]].shape)
    return array_bytes(root.shape)


def _result_bytes(shape: str) -> int:
    """Without the scratch space (bytes of int8) that library calls ask for as a second result."""
    arrays = _ARRAY.findall(shape)
    if len(arrays) > 1:
        arrays = [found for found in arrays if found[0] not in ("s8", "u8")]
    return sum(_bytes(*found) for found in arrays)


def _overlapped(instructions: Sequence[_Instruction], start: int) -> bool:
    """Whether a kernel is scheduled between the start of a collective and its end."""
    name = instructions[start].name
    for instruction in instructions[start + 1 :]:
        if instruction.operation.endswith("-done") and name in instruction.operands:
            return False
        if instruction.operation not in FREE and "-start" not in instruction.operation:
            if instruction.operation.endswith("-done"):
                continue
            return instructions[start].operation.endswith("-start")
    return False
