"""The supervised loss against a plain loop, and its masks against counts."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from spg_jax.diffusion.denoising import (
    correction_loss,
    denoising_loss,
    keeping_loss,
    random_tokens,
    stratified_masks,
)


def test_masks_are_stratified_over_the_batch():
    counts = []
    for seed in range(50):
        key, row_keys = jax.random.key(seed), jax.random.split(jax.random.key(seed + 100), 24)
        masked = stratified_masks(key, row_keys, 12)
        count = np.asarray(masked.sum(1))
        # 24 times are spread evenly over 12 counts, so that each count comes up twice.
        assert np.bincount(count, minlength=13)[1:].tolist() == [2] * 12
        counts.append(masked)
    rate = np.mean(counts, axis=(0, 1))
    assert_allclose(rate, 6.5 / 12, atol=0.05)


def test_loss_is_the_one_of_a_plain_loop():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 12)).astype(np.float32)
    completion = rng.integers(3, 12, (3, 5)).astype(np.int32)
    masked = np.array([[1, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]], bool)
    total = 0.0
    for row in range(3):
        log_z = np.log(np.exp(logits[row]).sum(-1))
        logp = [logits[row, i, completion[row, i]] - log_z[i] for i in range(5) if masked[row, i]]
        total -= np.mean(logp) / 3
    batch = jnp.asarray(logits), jnp.asarray(completion), jnp.asarray(masked)
    assert_allclose(denoising_loss(*batch), total, 1e-5)
    total = 0.0
    for row in (0, 2):  # All tokens of the other row are masked.
        log_z = np.log(np.exp(logits[row]).sum(-1))
        seen = [i for i in range(5) if not masked[row, i]]
        total -= np.mean([logits[row, i, completion[row, i]] - log_z[i] for i in seen]) / 3
    assert_allclose(keeping_loss(*batch), total, 1e-5)


def test_random_tokens_come_at_a_rate_of_each_row_and_are_allowed():
    """The mean rate is half the largest one; of 3 allowed ids one is the token itself."""
    allowed = jnp.asarray([False, True, True, True, False])
    tokens = jnp.full((4000, 10), 2, jnp.int32)
    drawn = np.asarray(
        random_tokens(jax.random.split(jax.random.key(0), 4000), tokens, allowed, 0.6)
    )
    assert set(np.unique(drawn)) == {1, 2, 3}
    changed = (drawn != 2).mean(1)
    assert_allclose(changed.mean(), 0.3 * 2 / 3, atol=0.01)
    # Binomial shares with rates p uniform on [0, .4] have the variance E[p(1-p)]/10 + .4^2/12.
    assert_allclose(changed.var(), (0.2 - 0.16 / 3) / 10 + 0.16 / 12, rtol=0.1)
    unchanged = random_tokens(jax.random.split(jax.random.key(0), 4000), tokens, allowed, 0.0)
    assert (np.asarray(unchanged) == 2).all()


def test_the_loss_of_corrections_counts_all_positions():
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]))
    loss = correction_loss(logits, jnp.asarray([[1, 1]]))
    assert_allclose(loss, -(np.log(0.25) + np.log(0.8)) / 2, rtol=1e-5)
