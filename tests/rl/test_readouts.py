"""Log-probabilities that are read out in pieces of the completion are those read out at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax import sharding
from spg_jax.diffusion.corruption import Draws
from spg_jax.rl import scores
from spg_jax.rl.scores import Reader, logit_pieces
from tests.meshes import mesh_of
from tests.parameters import random_params
from tests.rl.conftest import VOCAB, random_rollout

pytestmark = pytest.mark.numerical


def test_the_fewest_pieces_that_hold_no_more_than_the_limit(monkeypatch):
    monkeypatch.setattr(scores, 'LARGEST_LOGITS', 4 * 10 * 12 * 100)
    assert logit_pieces(10, 12, 100) == 1
    assert logit_pieces(11, 12, 100) == 2
    assert logit_pieces(30, 12, 100) == 3
    assert logit_pieces(41, 12, 100) == 6  # five do not divide 12 positions
    assert logit_pieces(10**6, 12, 100) == 12


def test_a_gradient_in_pieces_is_the_one_at_once(policy, monkeypatch):
    """With a label of its own for each draw, as where an edit is scored, on a mesh along all axes,
    where each device has a part of the vocabulary."""
    rng, mesh = np.random.default_rng(0), mesh_of(2, 2, 2)
    rollout = random_rollout()
    label = rng.integers(2, VOCAB, (8, 4, 12))
    draws = Draws(masked=rng.random((8, 4, 16)) < 0.5, label=label.astype(np.int32))
    weights = np.float32(np.random.default_rng(1).normal(size=label.shape))
    results, largest = [], []
    for limit in (2**40, 1):
        monkeypatch.setattr(scores, 'LARGEST_LOGITS', limit)
        reader = Reader(policy)

        def weighed(variables, rollout, draws, weights, reader=reader):
            return jnp.vdot(weights, reader(variables, rollout, draws, jnp.int32(0)))

        with jax.set_mesh(mesh):
            variables = {'params': random_params(policy.model, mesh=mesh)}
            rows = sharding.put_batch(mesh, (jax.device_get(rollout), draws, weights))
            traced = jax.jit(jax.value_and_grad(weighed)).trace(variables, *rows)
            largest.append(f'12,{VOCAB}]' in str(traced.jaxpr))
            results.append(jax.device_get(traced.lower().compile()(variables, *rows)))
    (loss, gradient), (in_pieces, other) = results
    assert largest == [True, False]  # whether an array holds the logits of all 12 positions
    assert_allclose(in_pieces, loss, rtol=1e-6)
    biggest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for left, right in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        assert_allclose(left, right, rtol=0, atol=1e-6 * biggest)
