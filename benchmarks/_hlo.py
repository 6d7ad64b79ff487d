"""What a compiled program does, from the text of its optimised HLO: every loop counts as often as it runs.

Bytes are those that leave or reach the chip's large memory, with the padding of its tiles; values in the memory next to
the units are free. Cycles are the compiler's own estimate of every instruction, which leaves out waits for memory.
"""

import collections
import dataclasses
import functools
import math
import re
import types
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BITS = re.compile(r"\d+")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z-]*)\((.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_PRODUCT = re.compile(
    r"stablehlo\.dot_general (.*?) : \((tensor<[\dx]*f32>, tensor<[\dx]*f32>)\)"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_STATED = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_KERNEL = 'custom_call_target="tpu_custom_call"'
_CALLERS = ("while", "call", "conditional")
_FREE = (
    *_CALLERS,
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "custom-call",
)
_LARGE = 2**16
_READS_PART = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shapes: list[tuple[str, str, str, str]]  # type, dimensions, layout, tiles
    op: str
    operands: list[str]
    rest: str


@dataclasses.dataclass
class Counts:
    """Sums over a program.

    Attributes:
      flops: of its products, and of kernels as these state them.
      bytes: moved to and from the large memory.
      cycles: the compiler's estimate, which has none for kernels.
      bundles: of machine code, where those of single instructions are given.
      collectives: number of each kind, one that runs beside other work counted once.
      groups: the groups of devices that exchange something.
      padding: bytes of an argument with the padding of its tiles over its own, of those from 64 KiB.
      carried: the same of what loops carry.
      filled: bytes that are written by a broadcast or scatter, in any memory.
      largest: bytes of the largest array that a loop carries, in any memory.
    """

    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    bundles: float = 0.0
    collectives: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    groups: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    padding: dict[str, float] = dataclasses.field(default_factory=dict)
    carried: dict[str, float] = dataclasses.field(default_factory=dict)
    filled: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    largest: int = 0


def counts(
    text: str, bundles: Mapping[str, int] = types.MappingProxyType({})
) -> Counts:
    """Return the sums over a compiled program, given its text and perhaps the bundles of its instructions."""
    program = _Program(text)
    found = Counts()
    exchanges: dict[
        str, tuple[str, int]
    ] = {}  # the parts of one have its number in common
    for times, instruction, computation, fused in program.walk(program.entry):
        of = program.computations[computation]
        if instruction.op in ("dot", "convolution"):
            found.flops += times * _flops(instruction, of)
        if stated := _STATED.search(instruction.rest):
            found.flops += times * int(stated.group(1))
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            number = _CHANNEL.search(instruction.rest)
            scattered = computation.startswith("all-reduce-scatter")
            key = number.group(1) if number else instruction.name
            _, before = exchanges.get(key, ("", 0))
            exchanges[key] = "reduce-scatter" if scattered else kind, max(times, before)
            found.groups.update(_groups(instruction.rest))
        if fused:
            continue
        if instruction.op == "parameter" and computation == program.entry:
            found.padding.update(_padding(instruction))
        if instruction.op == "while":
            found.carried.update(_padding(instruction))
            found.largest = max(
                found.largest,
                *(_bytes(shape, of_memory="") for shape in instruction.shapes),
            )
        if program.fills(instruction):
            found.filled[instruction.name] += times * sum(
                _bytes(shape, of_memory="") for shape in instruction.shapes
            )
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest):
            found.cycles += times * int(cycles.group(1))
        found.bundles += times * bundles.get(instruction.name, 0)
        found.bytes += times * program.moved(instruction, of)
    for kind, times in exchanges.values():
        found.collectives[kind] += times
    return found


def below_highest(lowered: str) -> collections.Counter[str]:
    """Return the float32 products of a lowered program that do not ask for the highest precision, by their shapes.

    A compiled program does not show them: where a product may round its factors, they arrive rounded.
    """
    found = _PRODUCT.findall(lowered)
    return collections.Counter(
        shapes for how, shapes in found if "precision = [HIGHEST, HIGHEST]" not in how
    )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _groups(rest: str) -> Iterator[tuple[int, ...]]:
    """Give the groups of devices of a collective, of which `{{0,1},{2,3}}` and `[2,2]<=[4]` are two notations."""
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        yield from (
            tuple(map(int, group.split(",")))
            for group in re.findall(r"\{([\d,]+)\}", listed.group(1))
        )
    elif counted := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
    ):
        shape = _numbers(counted.group(1))
        sizes = _numbers(counted.group(2))
        axes = _numbers(counted.group(3)) if counted.group(3) else None
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        devices = devices.transpose(axes).reshape(shape)
        yield from map(tuple, devices.tolist())


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = current = ""
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = head.group(2)
                self.computations[current] = {}
                self.entry = current if head.group(1) else self.entry
            elif (found := _INSTRUCTION.match(line)) and current:
                name, shape, op, rest = found.groups()
                operands = re.findall(r"%([\w.-]+)", rest[: rest.find(")")])
                self.computations[current][name] = _Instruction(
                    name, _SHAPE.findall(shape), op, operands, rest
                )

    def walk(
        self, name: str, times: int = 1, fused: bool = False
    ) -> Iterator[tuple[int, _Instruction, str, bool]]:
        """Give every instruction that runs, how often, and whether it is a part of another one."""
        for instruction in self.computations[name].values():
            yield times, instruction, name, fused
            inside = fused or instruction.op not in _CALLERS
            runs = times * (
                self._trips(instruction) if instruction.op == "while" else 1
            )
            branches = _BRANCHES.search(instruction.rest)
            named = re.findall(r"%([\w.-]+)", branches.group(1)) if branches else []
            for called in _CALLED.findall(instruction.rest) + named:
                yield from self.walk(called, runs, inside)

    def _trips(self, loop: _Instruction) -> int:
        """Return the bound that a loop's counter, from 0, is compared with: it may end earlier."""
        condition = re.search(r"condition=%([\w.-]+)", loop.rest)
        assert condition is not None, loop
        bounds = [
            int(i.rest[: i.rest.find(")")])
            for _, i, _, _ in self.walk(condition.group(1))
            if i.op == "constant" and i.shapes[0][:2] in (("s32", ""), ("u32", ""))
        ]
        if not bounds:
            raise ValueError(
                f"the loop {loop.name} has no bound in its condition: it cannot be counted"
            )
        return max(bounds)

    def fills(self, i: _Instruction) -> bool:
        """Return whether an instruction only repeats a value, or scatters."""
        if i.op != "fusion":
            return i.op in ("broadcast", "scatter")
        ops = {inner.op for inner in self._inside(i).values()}
        return (
            "scatter" in ops
            or "broadcast" in ops
            and ops <= {*_FREE, "broadcast", "convert"}
        )

    def moved(self, i: _Instruction, of: dict[str, _Instruction]) -> float:
        """Return the bytes that an instruction moves to and from the large memory."""
        if (i.op in _FREE and _KERNEL not in i.rest) or i.op.endswith("-done"):
            return 0.0
        if i.op.endswith(
            "-start"
        ):  # the result is the second of the tuple, of a copy the first
            result = i.shapes[0] if i.op == "copy-start" else i.shapes[1]
            sides = (result, of[i.operands[0]].shapes[0])
            return sum(_bytes(result, of_memory=side[3]) for side in sides)
        written = sum(map(_bytes, i.shapes))
        read = [sum(map(_bytes, of[name].shapes)) for name in i.operands]
        if i.op in _READS_PART:
            return written + min(written, read[0])
        if i.op == "fusion":
            inner = self._inside(i)
            for number, name in _parameters(inner).items():
                users = [user for user in inner.values() if name in user.operands]
                whole = read[number]
                part = self._part(name, inner)
                if part is not None:
                    read[number] = min(whole, part)
                updates = [
                    u
                    for u in users
                    if u.op == "dynamic-update-slice" and u.operands[0] == name
                ]
                if updates and part is not None:
                    # In place: the array is neither read nor written, apart from the new part and parts that are read.
                    written += (
                        sum(_bytes(inner[u.operands[1]].shapes[0]) for u in updates)
                        - whole
                    )
        return max(written, 0) + sum(read)

    def _inside(self, fusion: _Instruction) -> dict[str, _Instruction]:
        called = re.search(r"calls=%([\w.-]+)", fusion.rest)
        assert called is not None, fusion
        return self.computations[called.group(1)]

    def _part(self, name: str, inner: dict[str, _Instruction]) -> int | None:
        """Return the bytes of an operand that a fusion reads, where it reads slices alone; else None."""
        total = 0
        users = [user for user in inner.values() if name in user.operands]
        for user in users:
            if user.op in _READS_PART and user.operands[0] == name:
                parts: list[int | None] = [_bytes(user.shapes[0])]
            elif user.op == "dynamic-update-slice" and user.operands[0] == name:
                parts = [0]
            elif user.op == "fusion":
                within = self._inside(user)
                numbers = [
                    number
                    for number, operand in enumerate(user.operands)
                    if operand == name
                ]
                parts = [
                    self._part(_parameters(within)[number], within)
                    for number in numbers
                ]
            else:
                return None
            for part in parts:
                if part is None:
                    return None
                total += part
        return total if users else None


def _padding(i: _Instruction) -> Iterator[tuple[str, float]]:
    for shape in i.shapes:
        own = math.ceil(
            math.prod(int(size) for size in shape[1].split(",") if size)
            * _bits(shape[0])
            / 8
        )
        if own >= _LARGE:
            yield f"{shape[0]}[{shape[1]}]", _bytes(shape, of_memory="") / own


def _parameters(inner: dict[str, _Instruction]) -> dict[int, str]:
    return {
        int(p.rest.split(")")[0]): name
        for name, p in inner.items()
        if p.op == "parameter"
    }


def _bytes(shape: tuple[str, str, str, str], of_memory: str | None = None) -> int:
    """Return the bytes of an array with its padding; 0 where it is (or `of_memory` says) next to the units."""
    kind, dimensions, layout, tiles = shape
    if re.search(r"S\(\d", tiles if of_memory is None else of_memory):
        return 0
    sizes = [int(size) for size in dimensions.split(",") if size]
    minor = [int(axis) for axis in layout.split(",") if axis]
    if tile := re.search(r"T\(([\d,]+)\)", tiles):
        for axis, length in zip(
            minor, reversed([int(t) for t in tile.group(1).split(",")]), strict=False
        ):
            sizes[axis] = math.ceil(sizes[axis] / length) * length
    return math.ceil(math.prod(sizes) * _bits(kind) / 8)


def _bits(kind: str) -> int:
    found = _BITS.search(kind)
    if found:
        return int(found.group())
    return 8 if kind == "pred" else 0


def _flops(i: _Instruction, of: dict[str, _Instruction]) -> float:
    left = _sizes(of[i.operands[0]])
    right = _sizes(of[i.operands[1]])
    if i.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        axes = (
            contracted.group(1).split(",") if contracted and contracted.group(1) else []
        )
        return 2.0 * math.prod(_sizes(i)) * math.prod(left[int(axis)] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels is not None, i
    of_left, of_right, of_out = labels.groups()
    total = (
        2.0
        * left[of_left.index("b")]
        * right[of_right.index("i")]
        * right[of_right.index("o")]
    )
    if window := re.search(r"window=\{([^}]*)\}", i.rest):
        fields = dict(field.split("=") for field in window.group(1).split())
        for axis, size in enumerate(fields["size"].split("x")):
            one = {name: values.split("x")[axis] for name, values in fields.items()}
            label = str(axis)
            total *= _pairs(
                left[of_left.index(label)],
                _sizes(i)[of_out.index(label)],
                int(size),
                one,
            )
    return total


@functools.cache
def _overlaps(
    width: int, out: int, size: int, stride: int, low: int, spread: int, apart: int
) -> int:
    last = (width - 1) * spread
    at = (o * stride + k * apart - low for o in range(out) for k in range(size))
    return sum(0 <= place <= last and place % spread == 0 for place in at)


def _pairs(width: int, out: int, size: int, window: dict[str, str]) -> int:
    """Return how many products of an input and a factor there are along an axis: XLA makes axes of batches windows."""
    low = int(window.get("pad", "0_0").split("_")[0])
    spread = int(window.get("lhs_dilate", 1))
    apart = int(window.get("rhs_dilate", 1))
    return _overlaps(width, out, size, int(window.get("stride", 1)), low, spread, apart)


def _sizes(i: _Instruction) -> list[int]:
    return [int(size) for size in i.shapes[0][1].split(",") if size]
