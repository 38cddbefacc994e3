"""What a compiled program of one device does: products, and what it sends, counted from its text.

    counted(jax.jit(f).lower(*arguments).compile())

Loops count as often as they run. Bytes are those that a device must send: of n devices in a group, an
all-gather of b bytes on each sends (n - 1) b, an all-to-all b (n - 1) / n, an all-reduce twice that, a
reduce-scatter b (n - 1) / n, a permutation b.
"""

import collections
import dataclasses
import math
import re

WIDTHS = {"pred": 1, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = ("parameter", "get-tuple-element", "tuple", "constant", "bitcast")  # launches no kernel
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclasses.dataclass
class Counts:
    """Of one device: flops of products, how many of each collective, bytes sent, collectives within loops."""

    flops: float = 0.0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sent: float = 0.0
    in_loops: int = 0


def counted(compiled):
    """The counts of a compiled function."""
    computations, entry = _parsed(compiled.as_text())
    found = Counts()
    _visit(computations, entry, 1, False, found)
    return found


def launched(compiled):
    """Of a program for a GPU: how many kernels it launches, and how many bytes these read and write."""
    computations, entry = _parsed(compiled.as_text())
    return _launched(computations, entry)


def _launched(computations, name):
    types = {own: kind for own, kind, _, _ in computations[name]}
    kernels = size = 0
    for _, kind, op, rest in computations[name]:
        if op in ("while", "call"):
            inner = re.search(r"(?:body|to_apply)=%?([\w.\-]+)", rest).group(1)
            found, times = _launched(computations, inner), _trips(rest) if op == "while" else 1
            kernels, size = kernels + times * found[0], size + times * found[1]
        elif op not in FREE:
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            kernels += 1
            size += _bytes(kind) + sum(_bytes(types[each]) for each in operands if each in types)
    return kernels, size


def _trips(rest):
    """The turns of a loop that the compiler writes down; 1 without."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    return int(known.group(1)) if known else 1


def _parsed(text):
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("(")[0]:
            current = header.group(2)
            computations[current] = []
            entry = current if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            computations[current].append(found.groups())
    return computations, entry


def _visit(computations, name, times, looping, found):
    types = {own: kind for own, kind, _, _ in computations[name]}
    for _, kind, op, rest in computations[name]:
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        base = op.removesuffix("-start")
        if base == "all-reduce" and name.startswith("all-reduce-scatter"):
            base = "reduce-scatter"  # of a TPU, which writes one as a fusion of an all-reduce and a slice
        if op == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest).group(1)
            left = _sizes(types[operands[0]])
            depth = math.prod(left[int(k)] for k in contracted.split(",") if k)
            found.flops += times * 2.0 * depth * math.prod(_sizes(kind))
        elif base in COLLECTIVES:
            size = sum(_bytes(types[each]) for each in operands)
            found.collectives[base] += times
            found.in_loops += times * looping
            found.sent += times * _sent(base, size, _group(rest))
        elif op == "while":
            body = re.search(r"body=%?([\w.\-]+)", rest).group(1)
            _visit(computations, body, times * _trips(rest), True, found)
        elif op in ("fusion", "call", "async-start"):
            inner = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)
            if inner:
                _visit(computations, inner.group(1), times, looping, found)


def _sent(op, size, devices):
    part = (devices - 1) / devices
    return {
        "all-gather": size * (devices - 1),
        "all-reduce": 2 * size * part,
        "reduce-scatter": size * part,
        "all-to-all": size * part,
        "collective-permute": size * (devices > 1),
    }[op]


def _group(rest):
    """How many devices take part, whichever way the text says it."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed.group(1).split(","))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(tiled.group(1))
    named = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", rest)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2))
        return math.prod(int(part or sizes[name]) for name, part in parts)
    return 2


def _sizes(kind):
    return [int(size) for size in _ARRAY.search(kind).group(2).split(",") if size]


def _bytes(kind):
    return sum(
        (WIDTHS.get(name) or int(re.search(r"\d+", name).group()) // 8)
        * math.prod(int(size) for size in sizes.split(",") if size)
        for name, sizes in _ARRAY.findall(kind)
    )
