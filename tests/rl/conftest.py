"""A small policy and a random rollout, for the tests of this folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.models.policy import Policy
from spg_jax.models.transformer import TransformerConfig
from spg_jax.rl.rollout import Rollout

MASK, EOS, VOCAB = 0, 1, 24


@pytest.fixture
def config():
    """Eight rows of 4 + 12 tokens in groups of 4, with 4 draws and blocks of 4 positions."""
    config = default_config()
    config.sampling.update(prompt_length=4, length=12, steps=12, block_length=4, temperature=1.0)
    config.corruption.draws = 4
    config.rl.update(group_size=4, prompts=2, microbatch=8, inner_updates=2)
    config.optimizer.update(learning_rate=1e-3, warmup_fraction=0.0)
    return config


@pytest.fixture(scope='module')
def policy():
    allowed = np.arange(VOCAB) != MASK
    model = TransformerConfig(
        vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, scale_logits=True
    )
    return Policy(model, mask_id=MASK, eos_id=EOS, allowed=allowed)


def learning(config, optimizer):
    """The arguments of `make_update` between the policy and the shardings."""
    parts = assemble(config)
    return parts.objective, optimizer, parts.batching, config.train.seed


def random_rollout(rows: int = 8, prompt: int = 4, length: int = 12, seed: int = 0) -> Rollout:
    """Completions of different lengths, the first of which is EOS alone; rewards are 0 or 1.

    NumPy computes it, because JAX would compile a program for each operation and shape.
    """
    rng = np.random.default_rng(seed)
    completion = rng.integers(2, VOCAB, (rows, length)).astype(np.int32)
    for row in range(rows):
        completion[row, (row * 5) % (length + 2) :] = EOS
    prompt_mask = np.arange(prompt)[None, :] >= rng.integers(0, 3, rows)[:, None]
    reward = rng.integers(0, 2, rows).astype(np.float32)
    reward[:2] = 0, 1
    groups = reward.reshape(-1, 4)
    is_eos = completion == EOS
    rollout = Rollout(
        prompt=rng.integers(2, VOCAB, (rows, prompt)).astype(np.int32),
        prompt_mask=prompt_mask,
        completion=completion,
        scored=np.cumsum(is_eos, axis=1) - is_eos == 0,  # the tokens before the EOS, and the EOS
        commit_step=np.zeros((rows, length), np.int32),
        reward=reward,
        advantage=(groups - groups.mean(1, keepdims=True)).reshape(-1),
        example_id=np.arange(rows, dtype=np.uint32) + np.uint32(17),
    )
    return jax.tree.map(jnp.asarray, rollout)
