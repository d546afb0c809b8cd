"""What is read out when a rollout arrives, in microbatches and passes of draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.assembly import assemble
from spg_jax.diffusion.corruption import Corruption
from spg_jax.rl.arrival import make_arrival
from spg_jax.rl.objectives import Protocol, unigrpo
from spg_jax.rl.objectives.objective import never
from spg_jax.rl.scores import Reader, corrupt, moments
from spg_jax.runs.preparation import _sampler
from spg_jax.training import optimizers
from spg_jax.training.train_state import initial_state
from tests.meshes import mesh_of
from tests.parameters import random_params
from tests.rl.conftest import random_rollout

pytestmark = pytest.mark.numerical


def test_another_policy_that_samples_is_the_behaviour_policy(policy, config):
    """Read out under the masks of the first update, as `sampled_by` names it or the adapters lack
    a copy of it."""
    parts, rollout, seed = assemble(config), random_rollout(), config.train.seed
    corruption = Corruption('block', draws=2, block_length=4)
    protocol = Protocol(corruption, parts.sampling, parts.batching)
    objective = unigrpo.build(unigrpo.Settings(masking='coupled', masks=3), protocol)
    objective = dataclasses.replace(objective, kept={'actor': never}, sampled_by='actor')
    with jax.set_mesh(mesh_of()):
        variables = {'params': random_params(policy.model, mesh=mesh_of())}
        optimizer = optimizers.for_rl(parts.optimizer, 10)
        state = initial_state(
            variables, optimizer, policy, mesh_of(), average=False, kept=('actor',)
        )
        state = state.replace(trained=jax.tree.map(lambda x: 1.5 * x, state.trained))
        arrived = make_arrival(policy, objective, parts.batching, seed)(state, rollout)
        assert _sampler(objective, state)['params'] is state.kept['actor']['params']
        base = dataclasses.replace(objective, kept={}, sampled_by='reference')
        frozen = state.replace(frozen=variables, kept={})  # as new adapters leave it
        assert _sampler(base, frozen) == variables

    @jax.jit
    def of_actor():
        draws = corrupt(objective.corruption, rollout, moments(seed, rollout, 0, jnp.int32(0)))
        return Reader(policy)(variables, rollout, draws, state.step)

    assert_allclose(arrived.extras['behaviour'][:, 0], of_actor(), rtol=1e-5, atol=1e-6)


def test_the_behaviour_policy_is_read_under_the_draws_of_each_turn(policy, config):
    """Six draws, two at a time and four rows at a time, against one forward pass for each turn."""
    config.rl.update(microbatch=4, draws_per_pass=2)
    parts, rollout, seed = assemble(config), random_rollout(), config.train.seed
    corruption = Corruption('block', draws=2, block_length=4)
    protocol = Protocol(corruption, parts.sampling, parts.batching)
    objective = unigrpo.build(unigrpo.Settings(masking='coupled', masks=3), protocol)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        variables = {'params': random_params(policy.model, mesh=mesh)}
        optimizer = optimizers.for_rl(parts.optimizer, 10)
        state = initial_state(variables, optimizer, policy, mesh, average=False)
        state = state.replace(step=state.step + 4)  # the third rollout of two updates each
        arrived = make_arrival(policy, objective, parts.batching, seed)(state, rollout)
    behaviour = np.asarray(arrived.extras['behaviour'])
    assert behaviour.shape == (8, 2, 6, 12)

    @jax.jit
    def at_once(turn):
        moment = moments(seed, rollout, 4 + turn, turn)
        draws = corrupt(objective.corruption, rollout, moment)
        return Reader(policy)(variables, rollout, draws, state.step)

    for turn in range(2):
        assert_allclose(behaviour[:, turn], at_once(jnp.int32(turn)), rtol=1e-5, atol=1e-6)
    assert_array_equal(arrived.completion, rollout.completion)
