"""Objectives with scores of sequences draw for each row by itself, wherever it stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg_jax.rl.scores import corrupt, moments
from tests.rl.objectives.published import objective_of, published_rollout

SPREAD_OVER_THE_BATCH = ('espo', 'gdsd')  # Their numbers of masked tokens belong to places.


@pytest.mark.parametrize('name', ['rspo', 'espo', 'gdsd', 'dmpo', 'gdpo', 'vrpo', 'bgpo', 'ebpo'])
def test_rows_draw_by_their_identity(name):
    objective, rollout = objective_of(name), published_rollout()
    twins = jax.tree.map(lambda x: np.asarray(x)[np.zeros(6, int)], rollout)
    twins = twins.replace(example_id=np.arange(6, dtype=np.uint32))

    @jax.jit
    def draw(rollout, step):
        return corrupt(
            objective.corruption, rollout, moments(0, rollout, step, jnp.int32(0))
        ).masked

    def masks(rollout, step):
        return np.asarray(draw(rollout, np.int32(step)))

    at_first = masks(twins, 0)
    for row in range(1, 6):
        assert (at_first[row] != at_first[0]).any(-1).mean() > 0.7, 'equal rows have equal draws'
    assert (at_first != masks(twins, 1)).any((1, 2)).all()
    if name not in SPREAD_OVER_THE_BATCH:
        order = np.array([4, 2, 0, 1, 5, 3])
        moved = masks(jax.tree.map(lambda x: x[order], twins), 0)
        assert (moved == at_first[order]).all()
