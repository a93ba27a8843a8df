"""What a compiled program sends between devices, read from XLA's text of it.

`compiled.as_text()` is what XLA runs: collectives that a partitioner put in stand there, and those
that it joined are one. The text has no official grammar; what is read here are the parts that the
texts of jax 0.10 to 0.12 share, for CPU and for GPU.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = (
    *("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast", "send", "recv"),
)
"""The collectives that are found: all that XLA has."""


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it."""

    kind: str
    """One of `KINDS`; a pair of -start and -done is one collective."""
    bytes: int
    """Size, each time it runs, of what a device puts in or gets out, whichever is larger. For an
    all-reduce, that is what is summed; for an all-gather, the whole that comes out; for a
    reduce-scatter, the whole that goes in. It is not what crosses the network, which depends on the
    algorithm: in a ring of n, a device sends (n - 1) / n of it, for an all-reduce twice that."""
    arrays: int
    """Number of arrays in it: XLA joins collectives that are due at the same time."""
    types: tuple[str, ...]
    """XLA's names of their element types, each once, in alphabetic order: f32, bf16 …"""
    runs: int | None
    """How often it runs in one call of the program; None where a loop of unknown length or one of
    several branches decides that."""
    group: int
    """Number of devices that take part together."""
    op_name: str
    """Where in the traced function it comes from; empty if the text does not say."""


def collectives(compiled_text: str) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text; `compiled.as_text()` is it.

    Computations that nothing calls are left out.

    Raises ValueError for a text without an entry computation, or with a form that is not known.
    """
    program = _Program(compiled_text)
    found = []
    for line in program.instructions:
        kind = line.opcode.removesuffix("-start")
        runs = program.runs(line.computation)
        if kind not in KINDS or runs == 0:
            continue
        group = program.group_size(line)
        arrays = line.results()
        # Only the results have their types in the text.
        whole = group if kind == "reduce-scatter" else 1
        found.append(
            Collective(
                kind=kind,
                bytes=whole * sum(array.bytes for array in arrays),
                arrays=len(arrays),
                types=tuple(sorted({array.type for array in arrays})),
                runs=runs,
                group=group,
                op_name=line.op_name,
            )
        )
    return found


@dataclass(frozen=True)
class _Array:
    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * self._bits / 8)

    @property
    def _bits(self) -> int:
        """Bits of an element: f8e4m3fn has 8, c64 has 64."""
        if self.type in ("token", "opaque"):
            return 0
        number = re.match(r"[a-z]+(\d+)", self.type)
        return int(number[1]) if number else 8  # pred


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class _Line:
    """An instruction: `%name = TYPE opcode(operands), attributes`."""

    computation: str
    type: str
    opcode: str
    rest: str
    """Operands and attributes."""
    bare: str = field(init=False)
    """`rest` with every string empty, so that nothing within one is taken for an attribute."""

    def __post_init__(self):
        object.__setattr__(self, "bare", _STRING.sub('""', self.rest))

    @property
    def op_name(self) -> str:
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return name[1] if name else ""

    def results(self) -> list[_Array]:
        """The arrays that come out; a -start has those that go in, and more, beside them."""
        text = self.type
        if self.opcode in ("send", "recv"):
            text = _elements(text)[0]
        elif self.opcode == "all-reduce-start":
            # What goes in stands beside them only where they take its place.
            text = ", ".join(_elements(text)[1:]) if text.startswith("((") else text
        elif self.opcode.endswith("-start"):
            text = _elements(text)[1]
        return [
            _Array(name, tuple(int(size.lstrip("<=")) for size in shape.split(",") if size))
            for name, shape in _ARRAY.findall(text)
        ]

    def calls(self) -> Iterator[tuple[str, int | None]]:
        """The computations that it calls, and how often each time; None is not known."""
        if self.opcode.endswith(("-done", "-update")):
            return  # its -start calls
        trips = re.search(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"', self.rest)
        n = int(trips[1]) if trips else None
        for attribute, names in _CALLS.findall(self.bare):
            once = 1
            if attribute == "body":
                once = n
            elif attribute == "condition":
                once = n + 1 if n is not None else None
            elif self.opcode == "conditional":
                once = None
            for name in re.findall(r"[\w.-]+", names):
                yield name, once


_CALLS = re.compile(
    r"\b(body|condition|calls|to_apply|called_computations|branch_computations|true_computation"
    r"|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.-]+)\s.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT\s+)?%?[\w.-]+ = ")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")


class _Program:
    """The instructions of a text, and how often each computation runs."""

    def __init__(self, text: str):
        self.instructions: list[_Line] = []
        entry, computation = None, ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                computation = header[2]
                entry = computation if header[1] else entry
            elif computation and (begin := _INSTRUCTION.match(line)):
                end = _type_end(line, begin.end())
                if opcode := _OPCODE.match(line, end):
                    result = line[begin.end() : end]
                    rest = line[opcode.end() :]
                    self.instructions.append(_Line(computation, result, opcode[1], rest))
        if entry is None:
            raise ValueError("no ENTRY computation: this is not the text of a compiled program")
        sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
        self._devices = math.prod(map(int, sizes))
        self._callers: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
        for line in self.instructions:
            for called, times in line.calls():
                self._callers[called].append((line.computation, times))
        self._runs: dict[str, int | None] = {entry: 1}

    def runs(self, computation: str) -> int | None:
        """How often a computation runs in one call of the program."""
        if computation not in self._runs:
            runs: int | None = 0
            for caller, times in self._callers[computation]:
                outer = self.runs(caller)
                if outer == 0 or times == 0:
                    continue
                if runs is None or outer is None or times is None:
                    runs = None
                else:
                    runs += outer * times
            self._runs[computation] = runs
        return self._runs[computation]

    def group_size(self, line: _Line) -> int:
        """Devices of a group of a collective. A permutation has one: all that send or receive."""
        if pairs := re.search(r"source_target_pairs=\{((?:\{[\d, ]*\},?)*)\}", line.bare):
            return len(set(re.findall(r"\d+", pairs[1])))
        groups = re.search(r"replica_groups=", line.bare)
        if groups is None:
            return self._devices
        text = line.bare[groups.end() :]
        if listed := re.match(r"\{(?:\{([\d, ]*)\})?", text):  # {{0,1},{2,3}}; {}: all
            return len(listed[1].split(",")) if listed[1] else self._devices
        if iota := re.match(r"\[(?:\d+,)*?(\d+)\]<=", text):  # [2,4]<=[8]: 2 groups of 4
            return int(iota[1])
        if mesh := re.match(r"mesh\[([^]]*)\][^{]*\{([^}]*)\}", text):  # mesh['x'=2,'y'=4] {'y'}
            sizes = dict(re.findall(r"'?([^',=\s]+)'?=(\d+)", mesh[1]))
            axes = re.findall(r"'?([^',:\s()]+)'?(?::\(\d+\)(\d+))?", mesh[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        raise ValueError(f"replica groups of an unknown form: {text[:80]}")


def _elements(text: str) -> list[str]:
    """The parts of a tuple's type: `(f32[2]{0}, (f32[], s32[]))` has two."""
    parts, depth, begin = [], 0, 1
    for place, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if depth == 0 or (depth == 1 and letter == ","):
            parts.append(text[begin:place])
            begin = place + 1
    return parts


def _type_end(line: str, begin: int) -> int:
    """The place after the type that begins at `begin`."""
    if line[begin] != "(":
        space = line.find(" ", begin)
        return space if space >= 0 else len(line)
    depth = 0
    for place in range(begin, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if depth == 0:
            return place + 1
    return len(line)
