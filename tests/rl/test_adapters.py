"""Learning with adapters: their gradient and their dropout; and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from spg_jax.assembly import assemble
from spg_jax.models.lora import ADAPTER, COLLECTION, LoRA, merged_kernel
from spg_jax.rl.gradient import make_gradient
from spg_jax.sharding import abstract_params
from spg_jax.training import optimizers
from spg_jax.training.train_state import apply_gradient, initial_state
from tests.meshes import mesh_of
from tests.rl.conftest import random_rollout
from tests.rl.test_couplings import simple_objective
from tests.rl.test_learner import (
    assert_trees_close,
    draws_of,
    plain_loss,
    variables_of,
)

# One kernel: the masks of all seven are most of what compiling would cost.
LORA = LoRA(rank=3, alpha=5.0, dropout=0.25, targets=('query',))


def with_random_adapters(policy, lora=LORA, mesh=None):
    mesh = mesh or mesh_of()
    variables = variables_of(policy, mesh)
    policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, lora=lora))
    rng = np.random.default_rng(4)

    def noise(x):
        return jax.device_put(0.3 * rng.normal(size=x.shape).astype(np.float32), x.sharding)

    shapes = abstract_params(policy.model, mesh, collection=COLLECTION)
    return policy, variables | {COLLECTION: jax.tree.map(noise, shapes)}


def test_the_gradient_of_adapters_is_that_of_the_kernels_they_change(policy, config):
    """The truth is the derivative of a model without adapters, through the summed kernels, one of
    each layout; tests/models/test_lora.py has all seven."""
    lora = dataclasses.replace(LORA, dropout=0.0, targets=('query', 'down'))
    rollout, draws = random_rollout(), draws_of(config, random_rollout())
    adapted, variables = with_random_adapters(policy, lora)
    params, adapters = variables['params'], variables[COLLECTION]

    def loss_of(adapters):
        layers = dict(params['layers'])
        for target, own in adapters['layers'].items():
            layers[target] = {'kernel': merged_kernel(layers[target]['kernel'], own[ADAPTER], lora)}
        return plain_loss(params | {'layers': layers}, policy, config, rollout, draws)

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(adapters)
    # The test below has pieces of it.
    at_once = make_gradient(adapted, assemble(config).objective, microbatch=8, draws_per_pass=0)
    found, of_adapters, _ = jax.jit(at_once)(
        {COLLECTION: adapters}, {'params': params}, rollout, draws
    )
    assert_allclose(found, loss, rtol=1e-5)
    assert_trees_close(of_adapters[COLLECTION], gradient, atol=5e-6)


def test_dropout_is_the_same_in_pieces(policy, config):
    """A mask depends on row and draw only, and not on microbatches or passes of draws."""
    rollout, draws = random_rollout(), draws_of(config, random_rollout())
    adapted, variables = with_random_adapters(policy)
    keys = jax.random.split(jax.random.key(3), (8, 4))
    found = []
    trained, frozen = {COLLECTION: variables[COLLECTION]}, {'params': variables['params']}
    for microbatch, draws_per_pass in ((8, 0), (2, 1)):
        pieces = jax.jit(
            make_gradient(
                adapted,
                simple_objective(4),
                microbatch=microbatch,
                draws_per_pass=draws_per_pass,
            )
        )
        found.append(pieces(trained, frozen, rollout, draws, keys)[:2])
    assert_trees_close(found[1], found[0], atol=5e-6)
    other_masks = pieces(trained, frozen, rollout, draws, keys[::-1])
    assert abs(other_masks[0] - found[0][0]) > 1e-4


def test_only_adapters_are_trained(policy, config):
    """Frozen parameters keep every bit, and the optimiser has no state for them."""
    adapted, variables = with_random_adapters(policy)
    optimizer = optimizers.for_rl(assemble(config).optimizer, 10)
    state = initial_state(variables, optimizer, adapted, mesh_of(), average=False)
    before = jax.device_get(state.variables)
    update = jax.jit(apply_gradient, static_argnums=3)
    for _ in range(2):
        state, _ = update(state, state.trained, jnp.float32(0), optimizer)
    after = jax.device_get(state.variables)
    jax.tree.map(np.testing.assert_array_equal, after['params'], before['params'])
    trained = sum(x.size for x in jax.tree.leaves(before[COLLECTION]))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert 2 * trained <= moments < 2 * trained + 10  # two moments of each parameter, and counters
    moved = jax.tree.map(lambda a, b: np.any(a != b), after[COLLECTION], before[COLLECTION])
    assert all(jax.tree.leaves(moved))
