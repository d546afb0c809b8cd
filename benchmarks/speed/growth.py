"""How time and memory grow with batch, draws, length, vocabulary and steps, on the small model."""

import statistics
from dataclasses import replace

import jax

from benchmarks.speed.counts import slope
from benchmarks.speed.machine import times_in_turn
from benchmarks.speed.programs import PRESETS, Bench, Preset, Row, Work
from spg_jax.config import default_config
from spg_jax.sharding import make_mesh

ROUNDS = 5

# The loop over layers is not unrolled, because the programs then compile in half the time.
SMALL = replace(PRESETS['small'], unroll=1)
# What grows: (the program, the preset at each size).
AXES = {
    'batch of an update': ('update', {rows: replace(SMALL, rows=rows) for rows in (48, 96, 192)}),
    'draws M of an update': ('update', {draws: replace(SMALL, draws=draws) for draws in (2, 4, 8)}),
    'length of a completion in an update': (
        'update',
        {length: replace(SMALL, completion=length, steps=length) for length in (24, 48, 96)},
    ),
    'vocabulary of an update': (
        'update',
        {size: replace(SMALL, vocabulary=size) for size in (256, 1024, 4096)},
    ),
    'batch of a rollout': ('rollout', {rows: replace(SMALL, rows=rows) for rows in (48, 96, 192)}),
    'steps of a rollout': (
        'rollout',
        {steps: replace(SMALL, steps=steps) for steps in (6, 12, 24)},
    ),
}


def measure_growth(axis: str) -> Row:
    """Seconds, and bytes of an update, at each size along an axis, with the slopes of their logs.

    The sizes take turns. Seconds and their slope are medians over the rounds.

    Args:
      axis: a key of AXES.
    """
    program, presets = AXES[axis]
    with jax.set_mesh(make_mesh(default_config().mesh)):
        works = [_work(program, preset) for preset in presets.values()]
        rounds = times_in_turn([work.run for work in works], ROUNDS)
    sizes = list(presets)
    growth: Row = {
        'axis': axis,
        'sizes': sizes,
        'seconds': [statistics.median(seconds) for seconds in zip(*rounds, strict=True)],
        'slope': statistics.median(slope(sizes, seconds) for seconds in rounds),
    }
    amounts = [work.row.get('bytes') for work in works]
    if all(amounts):
        growth |= {'bytes': amounts, 'memory_slope': slope(sizes, amounts)}
    return growth


def _work(program: str, preset: Preset) -> Work:
    bench = Bench(preset)
    return bench.update(1.0) if program == 'update' else bench.rollout(False)
