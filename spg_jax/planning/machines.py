"""Chips with their published figures, and machines made of them, which need not be there.

Sources: Cloud TPU documentation, pages v5e, v5p and v6e (system architecture); NVIDIA's data sheets
of H100 SXM, H200 SXM and A100 80 GB SXM. The published bandwidth of a link is the sum of both
directions, so a chip receives at half of it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from spg_jax.process import libtpu

GIB = 2**30


class Chip(NamedTuple):
    """One accelerator."""

    name: str
    platform: str  # tpu | cuda
    memory: float  # bytes that a program can use
    flops: float  # dense bfloat16 FLOPs per second
    bandwidth: float  # bytes per second between the chip and its memory
    links: float  # bytes per second that the chip receives over all links to its neighbours


# The memory of a TPU is the limit that the compiler names when a program does not fit. XLA takes a
# share of a GPU's memory: these figures are for XLA_PYTHON_CLIENT_MEM_FRACTION=0.92; the default of
# XLA is 0.75.
CHIPS = {
    'v5e': Chip('TPU v5e', 'tpu', 15.75 * GIB, 197e12, 819e9, 200e9),
    'v5p': Chip('TPU v5p', 'tpu', 95.73 * GIB, 459e12, 2765e9, 600e9),
    'v6e': Chip('TPU v6e', 'tpu', 31.24 * GIB, 918e12, 1638e9, 400e9),
    'h100': Chip('H100 80 GB SXM', 'cuda', 0.92 * 80e9, 989e12, 3350e9, 450e9),
    'h200': Chip('H200 SXM', 'cuda', 0.92 * 141e9, 989e12, 4800e9, 450e9),
    'a100': Chip('A100 80 GB SXM', 'cuda', 0.92 * 80e9, 312e12, 2039e9, 300e9),
}
# The machines in docs/plan.md, in the order of its tables.
LISTED = ('v5e:2x4', 'v5e:4x4', 'v6e:2x4', 'v5p:2x2x1', 'h100:1', 'a100:8')


# The largest pod of these chips has 8960 (v5p). A description of more would take hours to make.
MOST_CHIPS = {'tpu': 8960, 'cuda': 1024}


class Machine(NamedTuple):
    """Chips that run one program."""

    topology: str  # its name, such as v5e:4x4
    chip: Chip
    count: int
    devices: Sequence[jax.Device] | None  # of a TPU slice, known to the compiler only; None on CUDA


def find_machine(topology: str) -> Machine:
    """The machine that a topology such as v5e:4x4, v5p:2x2x1 or h100:8 describes.

    Raises:
      ValueError: if the chip or the shape does not exist, or libtpu is needed and not installed.
    """
    name, _, shape = topology.partition(':')
    examples = ', '.join(LISTED)
    if name not in CHIPS:
        raise ValueError(f'topology {topology!r}: no chip {name!r}; use one such as {examples}')
    chip = CHIPS[name]
    sizes = shape.split('x')
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f'topology {topology!r}: no shape {shape!r}; use one such as {examples}')
    count, most = math.prod(map(int, sizes)), MOST_CHIPS[chip.platform]
    if count > most:
        raise ValueError(
            f'topology {topology!r}: more than {most} chips; use one such as {examples}'
        )
    if chip.platform == 'cuda':
        if len(sizes) > 1:
            raise ValueError(f'topology {topology!r}: GPUs are counted; use one such as {name}:8')
        return Machine(topology, chip, count, None)
    devices = _tpu_devices(topology)
    return Machine(topology, chip, len(devices), devices)


def _tpu_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice, which only the compiler knows."""
    if not libtpu.is_installed():
        raise ValueError("libtpu, which compiles for TPUs, is not installed; pip install '.[plan]'")
    libtpu.work_without_a_tpu()
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform='tpu').devices
    except jax.errors.JaxRuntimeError as error:
        reason = ' '.join(str(error).split()).partition(': ')[2]
        raise ValueError(
            f'topology {topology!r}: {reason}; use one such as {", ".join(LISTED)}'
        ) from None
