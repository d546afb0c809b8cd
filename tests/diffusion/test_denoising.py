"""The supervised loss against a plain loop, and its masks against counts."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from spg_jax.diffusion.denoising import denoising_loss, stratified_masks


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
    loss = denoising_loss(jnp.asarray(logits), jnp.asarray(completion), jnp.asarray(masked))
    assert_allclose(loss, total, 1e-5)
