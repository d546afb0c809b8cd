"""How time and memory grow with batch, draws, length, vocabulary and steps, on the small model."""

from dataclasses import replace

import jax

from benchmarks.speed.counts import slope
from benchmarks.speed.programs import PRESETS, Bench, Preset, Row

# The loop over layers is not unrolled, because the programs then compile in half the time.
SMALL = replace(PRESETS['small'], unroll=1)
# What grows: (the program, the preset at each size).
AXES = {
    'batch of an update': ('update', {rows: replace(SMALL, rows=rows) for rows in (24, 48, 96)}),
    'draws M of an update': ('update', {draws: replace(SMALL, draws=draws) for draws in (2, 4, 8)}),
    'length of a completion in an update': (
        'update',
        {length: replace(SMALL, completion=length, steps=length) for length in (24, 48, 96)},
    ),
    'vocabulary of an update': (
        'update',
        {size: replace(SMALL, vocabulary=size) for size in (256, 1024, 4096)},
    ),
    'batch of a rollout': ('rollout', {rows: replace(SMALL, rows=rows) for rows in (24, 48, 96)}),
    'steps of a rollout': (
        'rollout',
        {steps: replace(SMALL, steps=steps) for steps in (6, 12, 24)},
    ),
}


def measure_growth(axis: str, budget: float) -> Row:
    """Seconds, and bytes of an update, at each size along an axis, with the slopes of their logs.

    Args:
      axis: a key of AXES.
      budget: seconds for each size, beside compiling.
    """
    program, presets = AXES[axis]
    rows = [_measure(program, preset, budget) for preset in presets.values()]
    sizes, seconds = list(presets), [row['seconds'] for row in rows]
    growth: Row = {'axis': axis, 'sizes': sizes, 'seconds': seconds}
    growth['slope'] = slope(sizes, seconds)
    amounts = [row.get('bytes') for row in rows]
    if all(amounts):
        growth |= {'bytes': amounts, 'memory_slope': slope(sizes, amounts)}
    return growth


def _measure(program: str, preset: Preset, budget: float) -> Row:
    bench = Bench(preset)
    with jax.set_mesh(bench.mesh):
        if program == 'update':
            return bench.update(1.0, budget)
        return bench.rollout(False, budget)
