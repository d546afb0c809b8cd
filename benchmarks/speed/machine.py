"""What the machine can do at most, measured in the same process as what is compared with it."""

import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

MATRIX = 2048  # rows and columns of the matrices whose product gives the peak
NUMBERS = 2**26  # float32 numbers of an array of 256 MiB, which no cache holds
GIGA = 1e9
LONG = 5  # budgets of a call that is not made twice
PRODUCTS = 8  # products of matrices between two calls; the fastest is the peak at that time


def times(
    run: Callable[[], object],
    budget: float,
    most: int,
    after: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds of several calls, whose results are waited for.

    The first call takes fresh memory, which doubles the time of a large update, so it counts only
    where it is too long to be made twice.

    Args:
      run: what to call; it is compiled already.
      budget: no further call starts when those before it took so many seconds together; the first
        is made twice unless it took LONG times as much.
      most: calls that count.
      after: called after each call; its time does not count.
    """

    def seconds_of_call() -> float:
        seconds = _seconds(run)
        after()
        return seconds

    seconds = [seconds_of_call()]
    if seconds[0] > LONG * budget:
        return seconds
    seconds[0] = seconds_of_call()
    while len(seconds) < most and sum(seconds) < budget:
        seconds.append(seconds_of_call())
    return seconds


def times_and_peaks(
    run: Callable[[], object], budget: float, most: int, matrix: int = MATRIX
) -> tuple[list[float], list[float]]:
    """`times`, and for each call the peak in FLOP/s right before and after it.

    The clock of a processor and the load of its neighbours change within seconds, so that a peak
    from another minute says less about a call than the machine could do during it.
    """
    square, product = jnp.ones((matrix, matrix)), jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    rates: list[float] = []

    def measure_peak() -> None:
        seconds = min(_seconds(lambda: product(square, square)) for _ in range(PRODUCTS))
        rates.append(2 * matrix**3 / seconds)

    measure_peak()
    seconds = times(run, budget, most, measure_peak)
    around = itertools.pairwise(rates[-len(seconds) - 1 :])
    return seconds, [max(before_and_after) for before_and_after in around]


def times_in_turn(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of a call of each in turn, for each round after a first that does not count.

    What changes the speed of the machine then changes that of all, and ratios within a round stay.
    """
    return [[_seconds(run) for run in runs] for _ in range(rounds + 1)][1:]


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def measure_machine(matrix: int = MATRIX, numbers: int = NUMBERS, budget: float = 2.0) -> dict:
    """The peak of float32 products and the bandwidth of memory, with what the machine is.

    Args:
      matrix, numbers: sizes of what is measured.
      budget: seconds for each of the two.
    """
    product, combine = jax.jit(jnp.matmul), jax.jit(lambda x, y: x + 2 * y)
    square = jnp.ones((matrix, matrix))
    x = jnp.ones(numbers)
    product(square, square).block_until_ready()
    combine(x, x).block_until_ready()
    device = jax.devices()[0]
    return {
        'peak_gflops': 2
        * matrix**3
        / GIGA
        / min(times(lambda: product(square, square), budget, 50)),
        # Both arguments are read, and the result is written.
        'bandwidth_gb': 3 * x.nbytes / GIGA / min(times(lambda: combine(x, x), budget, 50)),
        'device': f'{device.platform} {device.device_kind}',
        'processor': _processor(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 0,
        'load': os.getloadavg()[0],  # processes that wanted a core in the last minute
        'jax': jax.__version__,
    }


def _processor() -> Any:
    try:
        with open('/proc/cpuinfo') as file:
            return next(
                line.split(':')[1].strip() for line in file if line.startswith('model name')
            )
    except (OSError, StopIteration):
        return platform.processor()
