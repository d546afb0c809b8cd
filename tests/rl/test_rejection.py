"""Rejection sampling: which completions are imitated, and that the loss is that of pre-training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from configs import countdown
from spg_jax.assembly import assemble
from spg_jax.diffusion.corruption import Draws
from spg_jax.diffusion.denoising import denoising_loss
from spg_jax.method import set_objective
from spg_jax.rl.experience import collections_due, rows_of_update
from spg_jax.rl.objectives import Batch
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import corrupt, moments

pytestmark = pytest.mark.numerical
B, P, C, V, ROWS = 40, 3, 5, 7, 8


def objective_of(**settings):
    config = countdown.get_config('tiny')
    with config.unlocked():
        set_objective(config, 'spg_jax.rl.rejection')
    config.rejection.update(settings)
    config.rl.update(prompts=2, group_size=4, microbatch=8)
    parts = assemble(config)
    return parts.objective, parts.batching


@pytest.fixture(scope='module')
def ring():
    """40 rows, 12 of which have reward 1; completions end at their third token."""
    rewards = np.zeros(B, np.float32)
    rewards[::4], rewards[1::20] = 1.0, 1.0
    length = jnp.arange(C) < 3
    return Rollout(
        prompt=jnp.ones((B, P), jnp.int32),
        prompt_mask=jnp.ones((B, P), bool),
        completion=jax.random.randint(jax.random.key(3), (B, C), 0, V),
        scored=jnp.broadcast_to(length, (B, C)),
        commit_step=jnp.zeros((B, C), jnp.int32),
        reward=jnp.asarray(rewards),
        advantage=jnp.asarray(rewards),
        example_id=jnp.arange(B, dtype=jnp.uint32),
        extras={},
    )


@pytest.fixture(scope='module')
def draws_at(ring):
    """A compiled function step -> the draws of all rows."""
    corruption = objective_of()[0].corruption
    return jax.jit(lambda step: corrupt(corruption, ring, moments(0, ring, step, jnp.int32(0))))


def test_the_base_policy_samples_everything_before_the_first_update():
    objective, batching = objective_of(batches=5)
    due = [collections_due(objective, batching, step) for step in range(300)]
    assert due == [5] + [0] * 299
    assert objective.sampled_by == 'base' and objective.experience.prompts == 10


def test_an_update_takes_random_right_completions_each_once(ring):
    objective, _ = objective_of()
    take = jax.jit(lambda step: rows_of_update(objective.experience, 0, step, ring))
    seen = []
    for step in range(60):
        rows = take(step)
        assert len(rows.reward) == ROWS and (np.asarray(rows.reward) == 1).all()
        ids = np.asarray(rows.example_id)
        assert len(set(ids.tolist())) == ROWS
        seen += ids.tolist()
    counts = np.bincount(seen, minlength=B)
    # Each of the 12 is taken in two of three updates: 40 of 60, with a deviation below 4.
    assert_array_equal(counts > 0, np.asarray(ring.reward) == 1)
    assert counts[counts > 0].min() > 40 - 5 * 4 and counts.max() < 40 + 5 * 4


def test_where_too_few_are_right_the_others_are_idle(ring):
    objective, _ = objective_of()
    few = ring.replace(reward=jnp.where(jnp.arange(B) < 6, ring.reward, 0.0))  # rows 0, 1 and 4
    rows = rows_of_update(objective.experience, 0, jnp.int32(1), few)
    assert sorted(np.asarray(rows.example_id[:3]).tolist()) == [0, 1, 4]
    idle = objective.idle(Batch(rows, None, {}, jnp.int32(0)))
    assert_array_equal(np.asarray(idle), [False] * 3 + [True] * 5)


def test_masks_are_those_of_pretraining(draws_at):
    """A uniform number of all positions, those after the EOS among them; the prompt stays clean."""
    numbers = []
    for step in range(50):
        draws = draws_at(step)
        assert not draws.masked[:, :, :P].any()
        assert_array_equal(np.asarray(draws.target), np.asarray(draws.masked[:, :, P:]))
        numbers.append(np.asarray(draws.target[:, 0]).sum(-1))
    counts = np.bincount(np.concatenate(numbers), minlength=C + 1)
    expected = 50 * B / C
    assert counts[0] == 0 and (abs(counts[1:] - expected) < 5 * expected**0.5).all()
    assert (np.asarray(draws.target[:, 0, 3:]).sum() > 0).all()


def test_the_loss_is_that_of_pretraining_over_the_right_rows(ring, draws_at):
    objective, _ = objective_of()
    logits = jax.random.normal(jax.random.key(0), (B, C, V))
    log_probs = jax.nn.log_softmax(logits)
    logp = jnp.take_along_axis(log_probs, ring.completion[:, :, None], -1)[:, None, :, 0]
    draws = draws_at(0)
    loss = objective.loss(logp, Batch(ring, draws, {}, jnp.int32(0)))
    right = np.asarray(ring.reward) == 1
    expected = denoising_loss(logits[right], ring.completion[right], draws.target[right, 0])
    assert float(loss.weight) == right.sum() == 12
    assert_allclose(loss.total / loss.weight, expected, rtol=1e-6)


def test_two_rows_by_hand(ring):
    """Row 0 is right, and its two masked tokens have -1 and -3 nats; row 2 is wrong."""
    objective, _ = objective_of(least_reward=0.5)
    rows = jax.tree.map(lambda x: x[jnp.array([0, 2])], ring)
    masked = jnp.zeros((2, 1, P + C), bool).at[:, :, P : P + 2].set(True)
    draws = Draws(masked, target=masked[:, :, P:])
    logp = jnp.full((2, 1, C), -9.0).at[:, :, 0].set(-1.0).at[:, :, 1].set(-3.0)
    loss = objective.loss(logp, Batch(rows, draws, {}, jnp.int32(0)))
    assert (float(loss.total), float(loss.weight)) == (2.0, 1.0)


def test_sampling_nothing_is_refused():
    with pytest.raises(ValueError, match='rejection.batches is 0; use 1 or more'):
        objective_of(batches=0)
