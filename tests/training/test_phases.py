"""The phases of a conversion: sequences that all blocks divide, and learning rates by hand."""

import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from spg_jax.training.phases import PHASES, WHOLE, Conversion, Phase, rounded

SHORT = (Phase(1, 40, 1.0), Phase(WHOLE, 30, 0.5), Phase(4, 10, 0.25))


def test_the_learning_rate_rises_and_follows_the_phases():
    conversion = Conversion(SHORT, examples_length=7, documents=1, length=8)
    assert (conversion.updates, conversion.final_block) == (80, 4)
    rates = [float(conversion.rate(jnp.int32(step))) for step in (0, 1, 39, 40, 69, 70, 79, 200)]
    assert_allclose(rates, [0.5, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25])  # The rise has two updates.


def test_the_default_sizes_rise_from_one_to_the_whole_and_fall():
    sizes = [block or 512 for block, _, _ in PHASES]
    peak = sizes.index(512)
    assert sizes[0] == 1 and sizes[: peak + 1] == sorted(sizes[: peak + 1])
    assert sizes[peak:] == sorted(sizes[peak:], reverse=True)
    phases = tuple(Phase(*phase) for phase in PHASES)
    assert rounded(456, phases) == 512
    Conversion(phases, examples_length=456, documents=1, length=512)


def test_two_examples_in_a_row_begin_blocks():
    with pytest.raises(ValueError, match='convert.length 20 / convert.documents 2 is not a mul'):
        Conversion(SHORT, examples_length=7, documents=2, length=20)
    Conversion(SHORT, examples_length=7, documents=2, length=24)
