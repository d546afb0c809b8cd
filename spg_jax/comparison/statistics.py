"""Means over seeds with 95 % intervals, and differences between two methods seed by seed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over seeds, and what is known of it."""

    mean: float
    half: float | None  # half-width of the 95 % interval; None for one seed, which has none
    number: int  # seeds


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values with Student's interval t s / sqrt(n), s the deviation.

    Raises:
      ValueError: there is no value.
    """
    number = len(values)
    if not number:
        raise ValueError('no value to take the mean of; give one or more')
    numbers = np.asarray(values, np.float64)
    if number == 1:
        return Estimate(float(numbers[0]), None, 1)
    quantile = stdtrit(number - 1, (1 + CONFIDENCE) / 2)
    half = quantile * numbers.std(ddof=1) / math.sqrt(number)
    return Estimate(float(numbers.mean()), float(half), number)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float]
) -> Estimate | None:
    """The mean difference between two methods over the seeds that both have; None without any.

    The runs of a seed share base policy, prompts and their order. What that adds to both is not in
    their difference, so that its interval is mostly narrower than those of the two means.

    Args:
      values: of the method, by seed.
      reference: of the method that it is compared with, by seed.
    """
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    return estimate([values[seed] - reference[seed] for seed in seeds])


def percent(value: Estimate | None, signed: bool = False) -> str:
    """An estimate in per cent, such as 71.1 ± 3.5; – if there is none."""
    if value is None:
        return '–'
    mean = f'{100 * value.mean:+.1f}' if signed else f'{100 * value.mean:.1f}'
    return mean if value.half is None else f'{mean} ± {100 * value.half:.1f}'
