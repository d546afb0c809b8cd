"""Random keys, and programs that take their seed as an argument."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from spg_jax.random import SEEDS, Purpose, Seeded, step_key


def noise_of(seed, step):
    return jax.random.bits(step_key(seed, Purpose.CORRUPT, step), (4,))


@pytest.mark.parametrize('seed', [0, 7, 2**31, SEEDS - 1])
def test_a_seed_that_is_an_argument_gives_the_numbers_of_the_seed(seed):
    assert_array_equal(Seeded(noise_of, seed)(3), noise_of(seed, 3))


def test_programs_of_two_seeds_are_one():
    step = np.int32(3)
    one, other = Seeded(noise_of, 0), Seeded(noise_of, 1)
    assert one.lower(step).as_text() == other.lower(step).as_text()
    assert np.any(one(step) != other(step))
