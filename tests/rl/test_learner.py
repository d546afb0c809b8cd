"""The learner against a plain derivative; its result does not depend on microbatches, passes of
draws or meshes."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose

from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.diffusion import bounds
from spg_jax.diffusion.corruption import Draws
from spg_jax.models.transformer import Transformer
from spg_jax.rl.gradient import elbo_spread, make_gradient
from spg_jax.rl.learner import make_update
from spg_jax.rl.scores import corrupt, moments
from spg_jax.training import optimizers
from spg_jax.training.train_state import initial_state, shardings_of
from tests.meshes import mesh_of
from tests.parameters import random_params
from tests.rl.conftest import EOS, MASK, VOCAB, learning, random_rollout
from tests.rl.test_couplings import WIDTH, Config, Toy, parameters, simple_objective

pytestmark = pytest.mark.numerical
CORRUPTERS = {}


def variables_of(policy, mesh=None):
    return {'params': random_params(policy.model, mesh=mesh)}


def corrupter(config):
    """A compiled (rollout, step) -> draws, which tests with equal settings share."""
    key = config.to_json()
    if key not in CORRUPTERS:
        corruption, seed = assemble(config).objective.corruption, config.train.seed

        @jax.jit
        def draw(rollout, step):
            return corrupt(corruption, rollout, moments(seed, rollout, step, jnp.int32(0)))

        CORRUPTERS[key] = draw
    return CORRUPTERS[key]


def draws_of(config, rollout):
    return corrupter(config)(rollout, jnp.int32(0))


def plain_loss(params, policy, config, rollout, draws):
    """-sum A L / sum n, from one forward pass, without microbatches and without the chain rule that
    the learner uses."""
    estimator = bounds.estimator(config.rl.estimator, config.sampling.block_length)
    rows, number, _ = draws.masked.shape
    sequence = jnp.concatenate([rollout.prompt, rollout.completion], axis=1)
    valid = jnp.concatenate([rollout.prompt_mask, jnp.ones(rollout.completion.shape, bool)], axis=1)
    noisy = jnp.where(draws.masked, MASK, sequence[:, None, :]).reshape(rows * number, -1)
    logits = Transformer(policy.config).apply(
        {'params': params}, noisy, jnp.repeat(valid, number, axis=0)
    )
    logits = logits[:, rollout.prompt.shape[1] :].reshape(
        rows, number, -1, policy.config.vocab_size
    )
    chosen = jax.nn.one_hot(rollout.completion, policy.config.vocab_size)
    logp = (jax.nn.log_softmax(logits) * chosen[:, None]).sum(-1)

    def bound(advantage, *arguments):
        elbo, eubo = estimator.elbo(*arguments), estimator.eubo(*arguments, config.rl.beta)
        negative = config.rl.omega * eubo + (1 - config.rl.omega) * elbo
        return jnp.where(advantage > 0, elbo, negative)

    masked = draws.masked[:, :, rollout.prompt.shape[1] :]
    of_rows = jax.vmap(bound)(rollout.advantage, logp, masked, rollout.scored, draws.block)
    return -jnp.vdot(rollout.advantage, of_rows) / rollout.scored.sum()


def assert_trees_close(left, right, **tolerance):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert_allclose(np.asarray(a), np.asarray(b), **tolerance)


def test_gradient_in_pieces_is_the_plain_derivative(policy, config):
    """There are four microbatches, with two draws at a time. One draw at a time is in
    tests/rl/test_spg.py, and all draws are in tests/test_golden_update.py."""
    variables, rollout = variables_of(policy), random_rollout()
    draws = draws_of(config, rollout)
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda params: plain_loss(params, policy, config, rollout, draws))
    )(variables['params'])
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(jax.device_get(gradient))) > 1e-3
    pieces = make_gradient(policy, assemble(config).objective, microbatch=2, draws_per_pass=2)
    loss_in_pieces, in_pieces, _ = jax.jit(pieces)(variables, {}, rollout, draws)
    assert_allclose(loss_in_pieces, loss, rtol=1e-5)
    assert_trees_close(in_pieces['params'], gradient, atol=2e-6)


class ToyModule(nn.Module):
    """The parameters of the toy as a module, whose axes say how a mesh splits them."""

    @nn.compact
    def __call__(self, *_):
        zeros = nn.initializers.zeros_init()
        for name, axes, shape in (
            ('embedding', (None, 'embed'), (VOCAB, WIDTH)),
            ('kernel', ('embed', 'vocab'), (WIDTH, VOCAB)),
        ):
            self.param(name, nn.with_logical_partitioning(zeros, axes), shape)


@dataclasses.dataclass(frozen=True)
class ConfigOfWhole(Config):
    vocab_size = VOCAB


class Whole(Toy):
    """The toy with all that a train state asks of a policy."""

    eos_id, model = EOS, ToyModule()


@pytest.fixture(scope='module')
def updates():
    """Compiled updates by mesh, which are compiled when they are first needed."""
    return {}


def start(config, updates, *sizes):
    """The mesh, a state at step 0 on it, and the update that tests of this file share.

    The policy and the loss are toys, because a transformer and SPG take longer to compile. The
    gradient of a transformer on a mesh is in tests/test_sharding.py, and its updates are in
    tests/test_going_on.py.
    """
    policy, mesh = Whole(ConfigOfWhole(None)), mesh_of(*sizes)
    optimizer = optimizers.for_rl(assemble(config).optimizer, 10)
    state = initial_state(parameters(False, mesh), optimizer, policy, mesh, average=False)
    if sizes not in updates:
        _, *rest = learning(config, optimizer)
        updates[sizes] = make_update(policy, simple_objective(4), *rest, shardings_of(state))
    return mesh, state, updates[sizes]


def test_update_is_the_same_on_a_mesh_and_in_microbatches(config, updates):
    """Parameters after two updates, each with fresh draws, are equal to 1e-5. More meshes, and
    adapters, are tested in tests/test_going_on.py."""
    outcomes = []
    for sizes, microbatch in ((1, 1, 1), 8), ((4, 2, 1), 4):
        config.rl.microbatch = microbatch
        mesh, state, update = start(config, updates, *sizes)
        rollout = sharding.put_batch(mesh, jax.tree.map(np.asarray, random_rollout()))
        with jax.set_mesh(mesh):
            for _ in range(2):
                state, metrics = update(state, rollout)
        outcomes.append(jax.device_get((state.trained, metrics)))
    (params, metrics), (other_params, other_metrics) = outcomes
    assert_trees_close(other_params, params, atol=1e-5, rtol=0)
    assert_trees_close(other_metrics, metrics, rtol=1e-4, atol=1e-5)


def test_every_update_draws_afresh_and_a_row_keeps_its_draws_wherever_it_stands(config):
    rollout, draw = jax.tree.map(np.asarray, random_rollout()), corrupter(config)
    first, again, second = (np.asarray(draw(rollout, np.int32(k)).masked) for k in (0, 0, 1))
    assert (first == again).all()
    assert (first != second).any(axis=(1, 2)).all()
    order = np.array([3, 0, 7, 1, 2, 6, 5, 4])
    moved = draw(jax.tree.map(lambda x: x[order], rollout), np.int32(0))
    assert (np.asarray(moved.masked) == first[order]).all()


def test_a_non_finite_update_is_skipped_and_counted(config, updates):
    mesh, state, update = start(config, updates, 1, 1, 1)
    before = jax.device_get((state.trained, state.opt_state))
    rollout = jax.tree.map(np.asarray, random_rollout())
    for count, poison in ((1, np.nan), (2, np.inf)):
        advantage = rollout.advantage.copy()
        advantage[1] = poison
        poisoned = rollout.replace(advantage=advantage)
        with jax.set_mesh(mesh):
            state, metrics = update(state, sharding.put_batch(mesh, poisoned))
        assert int(state.skipped) == count
        assert metrics['skipped'][0] == 1
        assert_trees_close((state.trained, state.opt_state), before, rtol=0)
    with jax.set_mesh(mesh):
        state, metrics = update(state, sharding.put_batch(mesh, rollout))
    assert int(state.skipped) == 0 and int(state.step) == 3
    assert metrics['skipped'][0] == 0


def test_the_spread_of_the_elbo_is_that_of_the_draws():
    """Row by row: draws of one token, of two and of none; a row with one draw does not count."""
    log_probs = np.float32([[[-1, -9], [-2, -4], [-5, -5]], [[-1, -2], [-9, -9], [-9, -9]]])
    target = np.array([[[1, 0], [1, 1], [0, 0]], [[1, 1], [0, 0], [0, 0]]], bool)
    batch = SimpleNamespace(target=target)
    total, weight = jax.jit(lambda x: elbo_spread(x, batch)['elbo_spread'])(log_probs)
    assert weight == 1
    assert_allclose(total, np.std([-1.0, -3.0], ddof=1), rtol=1e-6)


def test_memory_is_flat_in_the_number_of_draws():
    """One draw in a pass: M = 8 needs at most 1.3 times the temporary and output bytes of M = 2.

    The passes are the learner's, whatever the model and the loss; those of a toy compile in no
    time.
    """
    policy, variables = Toy(Config(None)), parameters(False, mesh_of())
    rollout = random_rollout(rows=32, length=48)
    needed = {}
    for draws in (2, 8):
        objective = simple_objective(draws)
        gradient = make_gradient(policy, objective, microbatch=32, draws_per_pass=1)
        draws_shapes = Draws(masked=jax.ShapeDtypeStruct((32, draws, 52), bool))
        lowered = jax.jit(gradient).lower(variables, {}, rollout, draws_shapes)
        memory = lowered.compile().memory_analysis()
        needed[draws] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert needed[8] <= 1.3 * needed[2]
