"""SPG as it is trained, in microbatches and passes of draws, against the released code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.diffusion.corruption import Draws, scored_positions
from spg_jax.models.policy import Policy
from spg_jax.models.weights import load_checkpoint
from spg_jax.rl.advantages import group_advantages, groups_with_signal
from spg_jax.rl.gradient import make_gradient
from spg_jax.rl.rollout import Rollout

pytestmark = pytest.mark.numerical

REFERENCE = Path(__file__).parents[1] / 'reference'
MASK, EOS = 250, 1
NAMES = {'block_random': 'block', 'random': 'uniform', 'block_all': 'block_full'}
NEGATIVES = {'elbo': 'elbo', 'eubo': 'eubo', 'mix': 'mixture', 'zero': 'none'}


@pytest.fixture(scope='module')
def published():
    with np.load(REFERENCE / 'spg_estimators.npz') as file:
        return {name: file[name] for name in file.files}


def test_training_gradient_is_the_published_one(published):
    """tests/diffusion/test_bounds.py has every corruption, estimate and beta."""
    case, microbatch, draws_per_pass = 'block_random/mix/beta1.5', 2, 1
    corruption, estimate, beta = case.split('/')
    model, _, params = load_checkpoint(REFERENCE / 'tiny_llada')
    policy = Policy(model, MASK, EOS, np.ones(model.vocab_size, bool))
    config = default_config()
    config.corruption.kind = NAMES[corruption]
    config.rl.update(negative=NEGATIVES[estimate], beta=float(beta.removeprefix('beta')))
    completion = jnp.asarray(published['completion'])
    rows = len(completion)
    rollout = Rollout(
        prompt=jnp.asarray(published['prompt']),
        prompt_mask=jnp.ones(published['prompt'].shape, bool),
        completion=completion,
        scored=scored_positions(completion, EOS),
        commit_step=jnp.zeros(completion.shape, jnp.int32),
        reward=jnp.zeros(rows),
        advantage=jnp.asarray(published['advantages']),
        example_id=jnp.arange(rows, dtype=jnp.uint32),
    )
    masked = jnp.asarray(published[f'{corruption}/noisy'] == MASK)
    draws = Draws(masked=masked, block=jnp.zeros(masked.shape[:2], jnp.int32))
    gradient_of = make_gradient(
        policy, assemble(config).objective, microbatch=microbatch, draws_per_pass=draws_per_pass
    )
    loss, gradient, _ = jax.jit(gradient_of)({'params': params}, {}, rollout, draws)
    assert_allclose(loss, published[f'{case}/loss'], rtol=1e-5)
    assert_allclose(optax.tree.norm(gradient), published[f'{case}/grad_norm'], rtol=1e-5)
    expected = published[f'{case}/grad_q_proj0'].T
    found = gradient['params']['layers']['query']['kernel'][0]
    assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_advantages_are_centred_in_their_group_and_not_scaled():
    reward = np.array([1, 0, 0, 1, 0.1, 0.1, 0.1, 0.1], np.float32)
    assert_allclose(group_advantages(reward, 4), [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0], atol=1e-7)
    assert groups_with_signal(jnp.asarray(reward), 4).tolist() == [True, False]
