"""Reads the text of a compiled module: its instructions, how often each is executed, and by which path.

XLA prints no counts: a loop's trips stand in its configuration (CUDA, CPU) or follow from its condition (TPU).
Terms are XLA's own: a module has computations, a computation instructions.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

WIDTHS: Mapping[str, int] = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4,
    "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8,
}  # fmt: skip
"""Bytes of one number. What else stands before brackets (token[], opaque[]) has none."""

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shape: as printed, layouts included; of several results a tuple in parentheses.
      operands: names of instructions of the same computation.
      rest: everything after the operands.
      root: whether it is what the computation returns.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False
    value: str = ""

    @property
    def scope(self) -> str:
        """JAX's path of names to the operation, "" where it has none."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]+)"', self.rest)
        return found[1] if found else ""

    def called(self, role: str) -> str | None:
        """Name of the computation in a role, such as body, condition, calls."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclass(frozen=True)
class Module:
    """Computations by name, instructions in order, and the name of the first one to run."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    def find(self, computation: str, name: str) -> Instruction | None:
        """An instruction by its name."""
        return next((one for one in self.computations.get(computation, ()) if one.name == name), None)


@dataclass(frozen=True)
class Executed:
    """An instruction as the program comes to it.

    Attributes:
      times: how often, all loops around it multiplied.
      computation: that it stands in.
      fused: it is part of a fusion, so it has no time and memory of its own.
      overlapped: it is part of a computation that runs beside others.
    """

    instruction: Instruction
    times: int
    computation: str
    fused: bool = False
    overlapped: bool = False


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array in a printed shape; tuples have several."""
    found = ((dtype, dims) for dtype, dims in _ARRAY.findall(shape) if dtype in WIDTHS)
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found]


def size(shape: str) -> int:
    """Bytes of all arrays in a printed shape, without the padding of layouts."""
    return sum(WIDTHS[dtype] * math.prod(dims) for dtype, dims in arrays(shape))


def plain(shape: str) -> str:
    """A printed shape without layouts and comments."""
    return re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", shape)


def parse(text: str) -> Module:
    """Reads a module as `Compiled.as_text` prints it.

    Raises:
      ValueError: no entry computation in it.
    """
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, None
    # What Pallas writes down of its kernels stands on lines of its own, in the midst of an instruction.
    for line in re.sub(r"=\{\n([^\n]*)\n\}", r"={\1}", text).splitlines():
        if current is None or not line.startswith(" "):
            header = _HEADER.match(line)
            current = computations.setdefault(header[2], []) if header else None
            if header and header[1]:
                entry = header[2]
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(line, found))
    if entry is None:
        raise ValueError("compiled module: no entry computation; its text is not in the form of XLA's HLO")
    return Module({name: tuple(lines) for name, lines in computations.items()}, entry)


def _instruction(line: str, found: re.Match) -> Instruction:
    start, depth = found.end(), 1
    end = start
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    inside = line[start : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(found[2], found[3], found[4], operands, line[end:], bool(found[1]), inside)


def trips(module: Module, computation: str, loop: Instruction) -> int | None:
    """How often a while loop runs; None where that is known only to the running program."""
    known = re.search(r'"known_trip_count": ?\{"n": ?"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = loop.called("condition")
    root = next((one for one in module.computations.get(condition, ()) if one.root), None)
    if root is None:
        return None
    limits = []
    for operand in _compared(module, condition, root):
        place, value = _origin(module, condition, operand)
        if place is not None:  # a part of the loop's state: what did it begin with
            value = _initial(module, computation, loop, place)
        limits.append(value)
    numbers = [n for n in limits if n is not None]
    # The counter is compared with the limit; both begin with a constant where the number of trips is one.
    return max(numbers) - min(numbers) if len(numbers) == 2 else None


def _compared(module: Module, computation: str, root: Instruction) -> Sequence[tuple[Instruction, str]]:
    """The two sides of a condition: each an instruction and the computation in which it stands."""
    if root.op == "fusion":
        inner = root.called("calls")
        compare = next((one for one in module.computations.get(inner, ()) if one.op == "compare"), None)
    else:
        inner, compare = computation, root if root.op == "compare" else None
    if compare is None:
        return ()
    sides = []
    for name in compare.operands:
        one, where = module.find(inner, name), inner
        if one is not None and one.op == "parameter" and inner != computation:
            one, where = module.find(computation, root.operands[int(one.value)]), computation
        if one is not None:
            sides.append((one, where))
    return sides


_COPIES = ("copy", "bitcast", "reshape", "convert", "copy-done", "copy-start", "broadcast")


def _origin(module: Module, computation: str, side: tuple[Instruction, str]) -> tuple[int | None, int | None]:
    """(place in the computation's tuple, None), (None, a constant), or (None, None) where it is neither."""
    one, where = side
    while one is not None and one.op in _COPIES and one.operands:
        one = module.find(where, one.operands[0])
    if one is None:
        return None, None
    if one.op == "constant":
        return None, int(one.value) if re.fullmatch(r"-?\d+", one.value) else None
    if one.op == "get-tuple-element":
        return int(re.search(r"index=(\d+)", one.rest)[1]), None
    return None, None


def _initial(module: Module, computation: str, loop: Instruction, place: int) -> int | None:
    """The constant that a part of a loop's state begins with."""
    state = module.find(computation, loop.operands[0])
    while state is not None and state.op in ("copy", "optimization-barrier"):
        state = module.find(computation, state.operands[0])
    if state is None or state.op != "tuple":
        return None
    one = module.find(computation, state.operands[place])
    return None if one is None else _origin(module, computation, (one, computation))[1]


def executed(module: Module, traced: int, choose: Callable[[Instruction, Sequence[str]], str]) -> Iterator[Executed]:
    """Every instruction that a program comes to, fusions and what runs beside others gone into.

    Args:
      traced: trips of loops whose number the module does not know.
      choose: (conditional, its branches) -> the branch that is taken.
    """

    def inside(computation: str, times: int, fused: bool, overlapped: bool) -> Iterator[Executed]:
        for one in module.computations.get(computation, ()):
            yield Executed(one, times, computation, fused, overlapped)
            if one.op == "while":
                n = trips(module, computation, one)
                yield from inside(one.called("body"), times * (traced if n is None else n), fused, overlapped)
            elif one.op == "conditional":
                yield from inside(choose(one, branches(one)), times, fused, overlapped)
            elif one.op in ("fusion", "call", "async-start"):
                child = one.called("calls") or one.called("to_apply")
                beside = overlapped or one.op == "async-start" or _starts(module.computations.get(child, ()))
                yield from inside(child, times, fused or one.op == "fusion", beside)

    yield from inside(module.entry, 1, False, False)


def _starts(lines: Sequence[Instruction]) -> bool:
    """Whether a TPU's fusion begins a collective that the fusions after it carry on beside their own work."""
    return any(one.target == "AsyncCollectiveStart" for one in lines)


def branches(conditional: Instruction) -> tuple[str, ...]:
    """Computations of a conditional, by index; of a truth value the false one first."""
    found = re.search(r"branch_computations=\{([^}]*)\}", conditional.rest)
    if found:
        return tuple(name.strip().lstrip("%") for name in found[1].split(","))
    return tuple(conditional.called(f"{side}_computation") for side in ("false", "true"))


_WORK = ("fusion", "dot", "convolution", "custom-call", "while", "conditional", "call")


def works_beside(module: Module, computation: str, start: Instruction) -> bool:
    """Whether work is scheduled between the start of something and what waits for its end."""
    lines = module.computations[computation]
    begun = next(i for i, one in enumerate(lines) if one is start)
    for one in lines[begun + 1 :]:
        if start.name in one.operands and one.op.endswith(("-done", "-update")):
            return False
        if one.op in _WORK and start.op.endswith("-start"):
            return True
    return False
