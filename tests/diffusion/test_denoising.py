"""The supervised loss against a plain loop, and its masks against counts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from numpy.testing import assert_allclose

from spg_jax.diffusion.denoising import denoising_loss, stratified_masks
from spg_jax.models.policy import Policy
from spg_jax.models.transformer import TransformerConfig


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
    model = TransformerConfig(vocab_size=12, width=16, layers=1, heads=2, kv_heads=2, mlp_width=16)
    policy = Policy(model, 0, 1, np.ones(12, bool))
    params = policy.model.init(jax.random.key(0), jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))[
        'params'
    ]
    variables = {'params': nn.meta.unbox(params)}
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 12, (3, 4)).astype(np.int32)
    prompt_mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], bool)
    completion = rng.integers(3, 12, (3, 5)).astype(np.int32)
    masked = np.array([[1, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]], bool)
    total = 0.0
    for row in range(3):
        noisy = np.where(masked[row], 0, completion[row])
        tokens = np.concatenate([prompt[row], noisy])[None]
        valid = np.concatenate([prompt_mask[row], np.ones(5, bool)])[None]
        logits = policy.unembed(variables, policy.hidden(variables, tokens, valid))[0, 4:]
        logp = np.asarray(jax.nn.log_softmax(logits))
        chosen = [logp[i, completion[row, i]] for i in range(5) if masked[row, i]]
        total -= np.mean(chosen) / 3
    assert_allclose(
        denoising_loss(policy, variables, prompt, prompt_mask, completion, jnp.asarray(masked)),
        total,
        1e-5,
    )
