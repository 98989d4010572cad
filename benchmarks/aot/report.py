"""What a compiled program does on one device: memory, operations, collectives, kernels, the compiler's cycles."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax

from benchmarks.aot import hlo, traffic
from benchmarks.aot.hlo import Executed, Instruction, Module
from benchmarks.aot.operations import is_kernel, kernel_name, operations
from benchmarks.aot.targets import Chip

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")

HALF = 0.5
"""Share of its peak that a kernel without estimated cycles is taken to reach."""

_VIEWS = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant",
          "optimization-barrier")  # fmt: skip


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes a device, as XLA has planned them; the host's own are what is kept in its memory on purpose."""
    plan = compiled.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp",
             "code": "generated_code"}  # fmt: skip
    found = {name: getattr(plan, f"{field}_size_in_bytes") for name, field in names.items()}
    found["total"] = sum(found.values()) - 2 * found["aliased"]
    host = {f"host_{name}": getattr(plan, f"host_{names[name]}_size_in_bytes") for name in ("arguments", "temporaries")}
    return found | {name: size for name, size in host.items() if size}


def part(scope: str) -> str:
    """What of the model an operation belongs to, by JAX's path of names to it."""
    if not scope:
        return "unnamed"
    found = re.search(r"\b(self_attn|cross_attn|ffn)(?=\b|_)", scope)
    name = found[1] if found else "rest of block" if "/blocks/" in scope else "outside blocks"
    return f"{name} kernel" if "attention_kernel" in scope else name


@dataclass(frozen=True)
class Program:
    """A compiled module, read.

    Attributes:
      module: of one device.
      traced: trips of a loop whose number only the run decides, the passes of guidance.
      kab: take the branch with KAB where cross-attention has both.
    """

    module: Module
    traced: int = 1
    kab: bool = False
    _known: dict[str, int] = field(default_factory=dict, repr=False)

    @cached_property
    def executed(self) -> list[Executed]:
        """Everything that the program comes to, in order."""
        return list(hlo.executed(self.module, self.traced, self._choose))

    @cached_property
    def shapes(self) -> dict[str, dict[str, str]]:
        """Printed shapes by computation and instruction."""
        return {name: {one.name: one.shape for one in lines} for name, lines in self.module.computations.items()}

    def _choose(self, conditional: Instruction, branches: Sequence[str]) -> str:
        """The branch of most products: a step that is live, with guidance. In cross-attention KAB decides.

        There the first branch, of False, is without it. It need not be the smaller one where a mesh repeats work.
        """
        if "cross_attn" in conditional.scope:
            return branches[1] if self.kab else branches[0]
        return max(branches, key=self._weight)

    def _weight(self, computation: str) -> int:
        """Operations of a computation and all that it calls."""
        if computation not in self._known:
            inside = Module(self.module.computations, computation)
            found = hlo.executed(inside, self.traced, self._choose)
            self._known[computation] = sum(one.times * (self._operations(one) or 0) for one in found)
        return self._known[computation]

    def _operations(self, one: Executed) -> int | None:
        return operations(one.instruction, self.shapes[one.computation])

    def operations(self) -> dict[str, int]:
        """By part of the model."""
        return self._summed(lambda one: self._operations(one) or 0)

    def cycles(self) -> dict[str, int]:
        """The compiler's estimate by part of the model; collectives and kernels are not in it. Empty for GPUs."""

        def estimated(one: Executed) -> int:
            found = None if one.fused else re.search(r'"estimated_cycles": ?"(\d+)"', one.instruction.rest)
            return int(found[1]) if found else 0

        return self._summed(estimated)

    def _summed(self, count: Callable[[Executed], int]) -> dict[str, int]:
        total: dict[str, int] = {}
        for one in self.executed:
            if number := one.times * count(one):
                name = part(one.instruction.scope)
                total[name] = total.get(name, 0) + number
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def collectives(self) -> list[dict[str, Any]]:
        """Kind, shape, times, and bytes of each (the larger of what goes in and comes out), the most bytes first.

        Asynchronous is one that computations are scheduled beside, not one that merely has a start and an end. On TPUs
        such a collective is written down again in every fusion of its chain; the one that starts it counts.
        """
        rows: dict[tuple, int] = {}
        for one in self.executed:
            line = one.instruction
            base = line.op.removesuffix("-start")
            if base not in COLLECTIVES or (one.fused and "chain_id=" in line.rest and not one.overlapped):
                continue
            if base == "all-reduce" and "all-reduce-scatter" in one.computation:  # how a TPU fuses it
                base = "reduce-scatter"
            beside = one.overlapped or hlo.works_beside(self.module, one.computation, line)
            given = sum(hlo.size(self.shapes[one.computation].get(name, "")) for name in line.operands)
            made = hlo.size(line.shape)
            if line.op.endswith("-start") and base != "all-reduce":  # its result holds the operands too
                made -= given
            key = (base, hlo.plain(line.shape), part(line.scope), max(given, made), beside)
            rows[key] = rows.get(key, 0) + one.times
        found = [{"kind": kind, "shape": shape, "part": where, "times": times, "bytes": size, "asynchronous": beside}
                 for (kind, shape, where, size, beside), times in rows.items()]  # fmt: skip
        return sorted(found, key=lambda row: -row["bytes"] * row["times"])

    def kernels(self) -> list[dict[str, Any]]:
        """Custom calls that compute: name, shape, times, operations of each (None where they are not known)."""
        rows: dict[tuple, int] = {}
        for one in self.executed:
            line = one.instruction
            if is_kernel(line):
                key = (kernel_name(line), hlo.plain(line.shape), part(line.scope), self._operations(one))
                rows[key] = rows.get(key, 0) + one.times
        return [{"name": name, "shape": shape, "part": where, "times": times, "operations": each}
                for (name, shape, where, each), times in rows.items()]  # fmt: skip

    def largest(self, count: int = 8) -> list[dict[str, Any]]:
        """The largest arrays that are made on the way."""
        rows: dict[tuple, int] = {}
        for one in self.executed:
            line = one.instruction
            if not one.fused and line.op not in _VIEWS and not line.op.endswith(("-start", "-done")):
                key = (hlo.plain(line.shape)[:200], line.op, part(line.scope), hlo.size(line.shape))
                rows[key] = rows.get(key, 0) + one.times
        found = sorted(rows.items(), key=lambda item: -item[0][3])[:count]
        return [{"shape": shape, "op": op, "part": where, "bytes": size, "times": times}
                for (shape, op, where, size), times in found]  # fmt: skip

    def traffic(self) -> dict[str, int]:
        """Bytes read and written by part of the model, see `traffic.moved`."""
        return self._summed(lambda one: traffic.moved(self.module, one, self.shapes[one.computation]))

    def loops(self) -> list[dict[str, Any]]:
        """Loops with their trips; those that the run decides are taken as `traced`."""
        found = [(one, hlo.trips(self.module, one.computation, one.instruction)) for one in self.executed
                 if one.instruction.op == "while"]  # fmt: skip
        return [{"scope": one.instruction.scope, "trips": self.traced if trips is None else trips,
                 "decided_by_run": trips is None, "times": one.times} for one, trips in found]  # fmt: skip


def describe(text: str, chip: Chip, traced: int, devices: int, total: int | None) -> dict[str, Any]:
    """Everything that the text of a compiled module says of one device.

    Args:
      traced: see `Program`.
      total: operations of the whole call on all devices, without padding and repeats; None if not known.
    """
    module = hlo.parse(text)
    program, active = Program(module, traced), Program(module, traced, kab=True)
    own, cycles = program.operations(), program.cycles()
    collectives = program.collectives()
    totals: dict[str, dict[str, int]] = {}
    for row in collectives:
        one = totals.setdefault(row["kind"], {"times": 0, "bytes": 0, "asynchronous": 0})
        one["times"] += row["times"]
        one["bytes"] += row["times"] * row["bytes"]
        one["asynchronous"] += row["times"] * row["asynchronous"]
    report = {
        "operations": {
            "device": sum(own.values()),
            "parts": own,
            "with_kab": sum(active.operations().values()),
            "total": total,
            "times_an_even_share": None if total is None else sum(own.values()) * devices / total,
        },
        "traffic": {"parts": program.traffic(), "cross_attn_with_kab": _cross(active.traffic())},
        "collectives": totals,
        "collectives_in_full": collectives,
        "kernels": program.kernels(),
        "largest": program.largest(),
        "loops": program.loops(),
    }
    if cycles:
        report["cycles"] = {"parts": cycles, "with_kab": sum(active.cycles().values()), **estimate(program, chip)}
    return report


def _cross(parts: Mapping[str, int]) -> int:
    return sum(n for name, n in parts.items() if name.startswith("cross_attn"))


def estimate(program: Program, chip: Chip) -> dict[str, float | int | None]:
    """Cycles and operations of attention's kernels apart from the rest, and seconds of both (None without a clock).

    Kernels whose cycles the compiler does not know are taken to reach HALF of the chip's peak. Collectives are left
    out, so this is what a step takes at the least.
    """
    cycles, own = program.cycles(), program.operations()
    kernel, rest = (sum(n for name, n in cycles.items() if name.endswith("kernel") is of) for of in (True, False))
    opaque = sum(row["times"] * (row["operations"] or 0) for row in program.kernels())
    seconds = [None, None]
    if chip.clock is not None:
        seconds = [rest / chip.clock, kernel / chip.clock + opaque / (HALF * chip.peak)]
    outside = sum(n for name, n in cycles.items() if name.startswith("outside"))
    return {
        "outside_blocks_seconds": None if chip.clock is None else outside / chip.clock,
        "attention_kernel": kernel,
        "attention_operations": sum(n for name, n in own.items() if name.endswith("kernel")),
        "rest": rest,
        "rest_seconds": seconds[0],
        "kernel_seconds": seconds[1],
    }


def scaled(cycles: Mapping[str, Any], layers: int, whole: int) -> dict[str, float] | None:
    """Seconds of `estimate` for a transformer of `whole` layers, from one of fewer; None without a clock."""
    if cycles["rest_seconds"] is None:
        return None
    outside = cycles["outside_blocks_seconds"]
    rest = outside + (cycles["rest_seconds"] - outside) * whole / layers
    return {"layers": whole, "rest_seconds": rest, "kernel_seconds": cycles["kernel_seconds"] * whole / layers}
