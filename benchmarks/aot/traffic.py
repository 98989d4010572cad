"""Bytes that a compiled module's instructions read from and write to memory, by its text."""

from collections.abc import Mapping

from benchmarks.aot import hlo
from benchmarks.aot.hlo import Executed, Instruction, Module

NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
           "opt-barrier", "optimization-barrier", "after-all", "iota", "partition-id")  # fmt: skip
"""Operations that move nothing themselves."""
SLICES = ("dynamic-slice", "slice", "gather")


def moved(module: Module, one: Executed, shapes: Mapping[str, str]) -> int:
    """What one execution reads and writes: operands and results, each once; of an operand that is only sliced the
    slices, of a result that is written into an operand the part that is written. Caches are not thought of.

    Args:
      shapes: of the instructions of its computation, printed.
    """
    line = one.instruction
    if one.fused or line.op in NOTHING or line.op.endswith(("-done", "-update")):
        return 0
    inner = module.computations.get(line.called("calls") or "", ()) if line.op == "fusion" else ()
    if not inner:
        return _plain(line, shapes)
    own = {each.name: each.shape for each in inner}
    root = next(each for each in inner if each.root)
    roots = [each for each in inner if each.name in root.operands] if root.op == "tuple" else [root]
    written = sum(_written(each, inner, own) for each in roots)
    read = 0
    for parameter in (each for each in inner if each.op == "parameter"):
        users = _users(parameter.name, inner)
        sliced = all(user.operands[0] == name and user.op in (*SLICES, "dynamic-update-slice") for user, name in users)
        if users and sliced:
            read += sum(hlo.size(user.shape) for user, name in users if not _into(user, name))
        else:
            read += hlo.size(parameter.shape)
    return read + written


def _plain(line: Instruction, shapes: Mapping[str, str]) -> int:
    if line.op in SLICES:
        return 2 * hlo.size(line.shape)
    if line.op == "dynamic-update-slice":
        return 2 * hlo.size(shapes.get(line.operands[1], ""))
    return hlo.size(line.shape) + sum(hlo.size(shapes.get(name, "")) for name in line.operands)


def _into(user: Instruction, name: str) -> bool:
    """Whether an operand is what an update is written into."""
    return user.op == "dynamic-update-slice" and user.operands[0] == name


def _users(name: str, lines: tuple[Instruction, ...]) -> list[tuple[Instruction, str]]:
    """(instruction, the name that it knows the operand by), views looked through."""
    found = []
    for each in lines:
        if name in each.operands:
            found += _users(each.name, lines) if each.op == "bitcast" else [(each, name)]
    return found


def _written(root: Instruction, lines: tuple[Instruction, ...], shapes: Mapping[str, str]) -> int:
    """Of one result of a fusion."""
    while root.op == "bitcast":
        root = next(each for each in lines if each.name == root.operands[0])
    return hlo.size(shapes.get(root.operands[1], "") if root.op == "dynamic-update-slice" else root.shape)
