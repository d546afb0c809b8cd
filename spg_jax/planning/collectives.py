"""The traffic between chips, read from a compiled program; a loop counts as often as it runs.

XLA's own cost analysis counts the body of a loop only once. In these programs all large costs are
in loops: over denoising steps, microbatches, draws and layers, and over the windows in which a TPU
overlaps a product with the gathering of its kernel.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

# Settings of a kernel stand on separate lines with braces, so not every brace ends a computation.
_COMPUTATION = re.compile(
    r'^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}(?=$|, execution_thread=)', re.S | re.M
)
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%([\w.\-]+) = (.*)$', re.M)
_OPERATION = re.compile(r'\s([a-z][a-z\-]*)\(')
_CALLED = re.compile(r'(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_CHANNEL = re.compile(r'channel_id=\d+')
_OPERAND = re.compile(r'%([\w.\-]+)')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d\w*)\[([\d,]*)\]')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# HLO writes the groups of chips that take part in three ways: as lists, an iota, or mesh axes.
_GROUP_LIST = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_GROUP_IOTA = re.compile(r'replica_groups=\[\d+,(\d+)\]')
_GROUP_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')


class Traffic(NamedTuple):
    """The traffic of one kind of collective in one program."""

    count: int  # how often collectives of this kind run
    received: float  # bytes that each chip receives in all of these runs


class _Instruction(NamedTuple):
    operation: str
    shape: str  # of the result
    rest: str  # operands and attributes


def read_traffic(text: str) -> dict[str, Traffic]:
    """The traffic of a compiled program by kind of collective, if no loop stops early.

    Args:
      text: the HLO of the program, `compiled.as_text()`.

    Raises:
      ValueError: if the number of iterations of a loop cannot be read.
    """
    bodies, entry = {}, ''
    for is_entry, name, body in _COMPUTATION.findall(text):
        bodies[name] = body
        entry = name if is_entry else entry
    runs: dict[str, tuple[str, int, float]] = {}  # identity -> kind, times, bytes received

    def walk(name: str, times: int, fused: bool = False) -> None:
        for label, instruction in _instructions(bodies[name]).items():
            rest = instruction.rest
            if instruction.operation == 'while':
                walk(re.search(r'body=%([\w.\-]+)', rest)[1], times * _trips(bodies, rest))
            elif kind := _kind(instruction.operation):
                identity = f'{name} {label}'
                if fused:
                    # TPUs spread a collective over the products that it overlaps with, even over
                    # products of an inner loop: each fusion has a piece of it. The piece in the
                    # outermost loop runs as often as the collective.
                    identity = kind + _CHANNEL.search(rest)[0]
                if identity not in runs or times < runs[identity][1]:
                    runs[identity] = kind, times, _received(kind, instruction)
            else:
                branches = ' '.join(_BRANCHES.findall(rest))
                for called in _CALLED.findall(rest) + _OPERAND.findall(branches):
                    walk(called, times, fused or instruction.operation == 'fusion')

    walk(entry, 1)
    traffic: dict[str, Traffic] = {}
    for kind, times, received in runs.values():
        count, total = traffic.get(kind, (0, 0.0))
        traffic[kind] = Traffic(count + times, total + times * received)
    return traffic


def _instructions(body: str) -> dict[str, _Instruction]:
    """Name -> instruction, for a computation; the instruction of the result is called 'ROOT'."""
    instructions = {}
    for root, name, definition in _INSTRUCTION.findall(body):
        operation = _OPERATION.search(definition)
        if operation:
            shape, rest = definition[: operation.start()], definition[operation.end() :]
            instructions[name] = _Instruction(operation[1], shape, rest)
            if root:
                instructions['ROOT'] = instructions.pop(name)
    return instructions


def _kind(operation: str) -> str | None:
    kind = operation.removesuffix('-start')
    return kind if kind in KINDS else None


def _received(kind: str, instruction: _Instruction) -> float:
    """Bytes that each chip receives when a collective runs once, by the usual ring algorithms."""
    arrays = [_bytes(*array) for array in _ARRAY.findall(instruction.shape)]
    if instruction.operation.endswith('-start') and kind != 'all-reduce':
        # The shape is a tuple: the operands, then the results, then counters of four bytes each.
        arrays = [size for size in arrays if size > 4]
        arrays = arrays[len(arrays) // 2 :]
    result = sum(arrays)
    if kind == 'collective-permute':
        return result
    chips = _group(instruction.rest)
    if kind == 'reduce-scatter':
        return result * (chips - 1)
    return result * (chips - 1) / chips * (2 if kind == 'all-reduce' else 1)


def _group(rest: str) -> int:
    """The number of chips that take part in a collective together."""
    if group := _GROUP_LIST.search(rest):
        return len(group[1].split(','))
    if group := _GROUP_IOTA.search(rest):
        return int(group[1])
    if group := _GROUP_MESH.search(rest):
        sizes = dict(axis.split('=') for axis in group[1].split(','))
        return math.prod(int(sizes[axis.strip()]) for axis in group[2].split(','))
    raise ValueError(f'no replica groups in {rest[:200]!r}; expected a list, an iota or mesh axes')


def _trips(bodies: Mapping[str, str], loop: str) -> int:
    """The iterations of a while loop, from a note of the compiler or as limit / step of a counter.

    Counters start at 0. A loop that may stop early, as decoding does once every row has ended,
    counts as if it did not.
    """
    if note := _KNOWN_TRIPS.search(loop):
        return int(note[1])
    condition = _instructions(bodies[re.search(r'condition=%([\w.\-]+)', loop)[1]])
    body = _instructions(bodies[re.search(r'body=%([\w.\-]+)', loop)[1]])
    results = _operands(body['ROOT'])
    trips = []
    for test in condition.values():
        if test.operation != 'compare' or 'direction=LT' not in test.rest:
            continue
        counter, limit = (_source(condition, name) for name in _operands(test))
        if counter.operation != 'get-tuple-element' or limit.operation != 'constant':
            continue
        index = int(re.search(r'index=(\d+)', counter.rest)[1])
        advance = _source(body, results[index])
        if advance.operation != 'add':
            continue
        steps = [_source(body, name) for name in _operands(advance)]
        steps = [_constant(step) for step in steps if step.operation == 'constant']
        trips += [-(-_constant(limit) // step) for step in steps]
    if not trips:
        raise ValueError(f'cannot read how often a loop runs: {loop[:200]!r}')
    # The condition may also compare the counter with 0, to take a remainder.
    return max(trips)


def _operands(instruction: _Instruction) -> list[str]:
    return _OPERAND.findall(instruction.rest[: instruction.rest.index(')')])


def _source(instructions: Mapping[str, _Instruction], name: str) -> _Instruction:
    """The instruction that made a value, which copies may hide."""
    while instructions[name].operation == 'copy':
        (name,) = _operands(instructions[name])
    return instructions[name]


def _constant(instruction: _Instruction) -> int:
    return int(re.match(r'\d+', instruction.rest)[0])


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    return math.prod(int(size) for size in shape.split(',') if size) * bits // 8
