"""AGRPO against its released code, a case by hand, and the states that it draws."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.assembly import assemble
from spg_jax.data.batches import PromptBatch
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.diffusion.corruption import Corruption, Draws
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.rl.collection import make_collect
from spg_jax.rl.experience import experience_shapes
from spg_jax.rl.objectives import Batch, Loss, Protocol
from spg_jax.rl.objectives.agrpo import Settings, build, last_step, states_at, step_law
from spg_jax.rl.scores import Reader, corrupt, moments
from tests.meshes import mesh_of
from tests.parameters import random_params
from tests.rl.objectives.published import (
    assert_published,
    draws_from,
    gradient_of,
    objective_of,
    published,
    published_rollout,
)

pytestmark = pytest.mark.numerical

STEPS = 16


def recorded_rollout():
    """The published rows with what their sampler recorded."""
    arrays = published()
    return published_rollout(
        log_prob=arrays['agrpo/old_logp'],
        entropy=arrays['agrpo/old_entropy'],
        kept=arrays['agrpo/kept_tokens'],
    )


last_steps = jax.jit(jax.vmap(last_step))


def published_draws(case):
    arrays = published()
    steps, commit_step = arrays[f'agrpo/{case}/steps'], arrays['commit_step'][:, None]
    importance = arrays.get(f'agrpo/{case}/importance', np.ones(steps.shape, np.float32))
    masked, target = commit_step >= steps[:, :, None], commit_step == steps[:, :, None]
    return draws_from(masked, target=target, weight=importance)


def objective(case='entropy', **settings):
    """With the published settings of a case, at the published temperature."""
    made = objective_of('agrpo', states=8, importance=case, **settings)
    readout = dataclasses.replace(made.readout, temperature=float(published()['agrpo/temperature']))
    return dataclasses.replace(made, readout=readout)


@pytest.mark.parametrize('case', ['entropy', 'uniform'])
def test_loss_and_gradient_are_the_published_ones(case):
    epsilon = float(published()[f'agrpo/{case}/epsilon'])
    metrics = assert_published(
        f'agrpo/{case}', objective(case, epsilon=epsilon), recorded_rollout(), published_draws(case)
    )
    assert metrics['clip_share'][0] > 0


@pytest.mark.parametrize('case', ['entropy', 'uniform'])
def test_last_steps_and_weights_are_the_published_ones(case):
    """Each u lies in the middle of its step, so that the published steps are drawn again."""
    arrays, rollout = published(), recorded_rollout()
    assert_array_equal(last_steps(rollout), arrays[f'agrpo/{case}/last_step'])
    expected = published_draws(case)

    @jax.jit
    @jax.vmap
    def draw_again(row, steps):
        law = step_law(row, STEPS, case)
        return states_at(row, law, (jnp.cumsum(law) - law / 2)[steps])

    draws = draw_again(rollout, arrays[f'agrpo/{case}/steps'])
    assert_array_equal(draws.masked, expected.masked)
    assert_array_equal(draws.target, expected.target)
    assert_allclose(draws.weight, expected.weight, rtol=1e-4)


def test_on_policy_it_is_reinforce_on_the_law_of_the_sampler():
    """Where the policy is the behaviour, the gradient is that of -sum A w l / (K G)."""
    arrays, draws = published(), published_draws('entropy')
    rollout = recorded_rollout()
    rollout.extras['log_prob'] = jnp.asarray(arrays['agrpo/logp'])
    _, gradient, metrics = gradient_of(objective(), rollout, draws)
    assert metrics['clip_share'][0] == 0

    def loss(logp, batch):
        terms = batch.advantage[:, None, None] * draws.weight[:, :, None] * logp
        return Loss(-jnp.where(batch.target, terms, 0.0).sum(), jnp.float32(48), {})

    reinforce = dataclasses.replace(objective(), loss=loss)
    _, expected, _ = gradient_of(reinforce, rollout, draws)
    for found, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert_allclose(found, leaf, rtol=0, atol=1e-4 * np.abs(leaf).max())


def small_rollout(completion, commit_step, **extras):
    """Rows of tokens with EOS 1, advantages 1 and -1 in turn."""
    completion = np.asarray(completion)
    rows = len(completion)
    before = np.cumsum(completion == 1, axis=1) - (completion == 1)
    return jax.tree.map(lambda x: x[:rows], published_rollout()).replace(
        completion=completion,
        scored=before == 0,
        commit_step=np.asarray(commit_step),
        advantage=np.where(np.arange(rows) % 2, -1.0, 1.0),
        extras={name: np.asarray(value, np.float32) for name, value in extras.items()},
    )


def test_two_sequences_by_hand_and_two_groups_by_their_mean():
    made = objective_of('agrpo', group_size=2, states=2, epsilon=0.2)
    rollout = small_rollout(
        [[5, 6], [1, 1]], [[0, 0], [1, 0]], log_prob=np.log([[0.5, 0.5], [0.5, 0.5]])
    )
    draws = Draws(
        masked=np.ones((2, 2, rollout.prompt.shape[1] + 2), bool),
        target=np.array([[[True, True], [True, True]], [[False, True], [True, False]]]),
        weight=np.array([[1.0, 3.0], [0.5, 2.0]]),
    )
    logp = np.log(np.array([[[0.8, 0.4], [0.5, 0.55]], [[0.9, 0.2], [0.7, 0.9]]]))
    # Row 0: ratios 1.6 (clipped to 1.2) and 0.8 at weight 1, 1 and 1.1 at weight 3.
    # Row 1: 0.4, clipped to 0.8 for A = -1, at weight 0.5; 1.4 at weight 2. K G is 4.
    expected = (-(1.2 + 0.8) - 3 * (1.0 + 1.1) + 0.5 * 0.8 + 2 * 1.4) / 4

    @jax.jit
    def value(logp, rollout, draws):
        loss = made.loss(logp, Batch(rollout, draws, {}, jnp.int32(0)))
        return loss.total / loss.weight, loss.metrics['clip_share']

    one, clipped = value(logp, rollout, draws)
    assert_allclose(one, expected, rtol=1e-5)
    assert [float(x) for x in clipped] == [2.0, 6.0]
    other = -0.3 * np.ones_like(logp)
    both = jax.tree.map(lambda x: np.concatenate([x, x]), (rollout, draws))
    mean = (expected + value(other, rollout, draws)[0]) / 2
    assert_allclose(value(np.concatenate([logp, other]), *both)[0], mean, rtol=1e-5)


# Six rows of eight tokens, two a step: the first two end early, and rows 2 and 3 stopped early.
COMMIT = np.array(
    [
        [0, 0, 1, 1, 2, 2, 3, 3],
        [3, 2, 1, 0, 3, 2, 1, 0],
        [0, 1, 1, 0, -1, -1, -1, -1],
        [1, 0, 1, 0, -1, -1, -1, -1],
        [0, 1, 2, 3, 0, 1, 2, 3],
        [3, 3, 2, 2, 1, 1, 0, 0],
    ]
)
COMPLETION = np.array(
    [
        [7, 7, 7, 1, 1, 1, 1, 1],  # tokens until step 1
        [7, 7, 1, 1, 1, 1, 1, 1],  # until step 3
        [7, 7, 1, 7, 1, 1, 1, 1],  # until step 1; what follows the EOS counts
        [1, 1, 1, 1, 1, 1, 1, 1],  # nothing but EOS: step 0
        [7, 7, 7, 7, 7, 7, 7, 7],
        [7, 7, 7, 7, 7, 7, 7, 1],
    ]
)
LAST = [1, 3, 1, 0, 3, 3]


def test_states_are_inputs_of_the_sampler_drawn_by_their_law():
    """Without importance, every step is drawn as often: see the test of stratified draws."""
    states, entropy = 4, np.random.default_rng(0).uniform(0.1, 1, COMMIT.shape)
    entropy[COMMIT < 0] = 0.0
    made = objective_of('agrpo', states=states, importance='entropy')
    rollout = small_rollout(COMPLETION, COMMIT, entropy=entropy)
    assert_array_equal(last_steps(rollout), LAST)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0))
    def draw(seed, step):
        return corrupt(made.corruption, rollout, moments(seed, rollout, step, jnp.int32(0)))

    draws = jax.tree.map(np.asarray, draw(0, np.arange(200)))
    prompt = rollout.prompt.shape[1]
    assert not draws.masked[..., :prompt].any()
    chosen = np.zeros((200, len(COMMIT), states, 4))
    for step in range(4):
        at_step = (draws.target == (step == COMMIT)[None, :, None]).all(-1)
        at_step &= draws.target.any(-1)
        chosen[..., step] = at_step
        seen = draws.masked[..., prompt:] == ((step <= COMMIT) | (COMMIT < 0))[None, :, None]
        assert seen.all(-1)[at_step].all()
    assert (chosen.sum(-1) == 1).all()
    for row, last in enumerate(LAST):
        law = np.array([entropy[row][COMMIT[row] == step].sum() for step in range(4)])
        law[last + 1 :] = 0.0
        law /= law.sum()
        share = chosen[:, row].mean((0, 1))
        assert (np.abs(share - law) <= 5 * np.sqrt(law * (1 - law) / (200 * states))).all()
        weight = (chosen[:, row] @ (1 / ((last + 1) * np.maximum(law, 1e-9)))).ravel()
        assert_allclose(draws.weight[:, row].ravel(), weight, rtol=1e-4)


def test_draws_are_stratified_over_the_batch_and_not_within_a_row():
    """Six rows of four steps, four draws each: every step comes six times."""
    made = objective_of('agrpo', states=4, importance='uniform')
    rollout = small_rollout(*(np.repeat(x[4:5], 6, axis=0) for x in (COMPLETION, COMMIT)))

    @jax.jit
    def draw(rollout):
        moment = moments(0, rollout, jnp.int32(7), jnp.int32(0))
        return corrupt(made.corruption, rollout, moment).target

    target = np.asarray(draw(rollout))
    steps = (target * COMMIT[4]).max(-1)  # [6, 4]
    assert np.bincount(steps.ravel()).tolist() == [6, 6, 6, 6]
    assert len({tuple(sorted(row)) for row in steps.tolist()}) > 1


def test_states_of_a_rollout_give_back_the_law_that_the_sampler_recorded(policy, config):
    """The readouts of the policy that sampled are the recorded log-probabilities."""
    config.sampling.update(commit='random', steps=6, temperature=0.6, top_k=7, top_p=0.95)
    parts = assemble(config)
    sampling, batching = parts.sampling, parts.batching
    protocol = Protocol(Corruption('full', 1, 1), sampling, batching)
    made = build(Settings(states=3), protocol)
    sampling = dataclasses.replace(sampling, records=made.records)
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4) + 5
    prompts = PromptBatch(tokens, tokens > 5, np.arange(2, dtype=np.uint32), [0, 1])
    tokenizer = WordTokenizer([f'w{number}' for number in range(21)])
    mesh = mesh_of(2, 1, 1)
    with jax.set_mesh(mesh):
        variables = {'params': random_params(policy.model, mesh=mesh)}
        rollout, _ = make_collect(
            policy, NoReward(), tokenizer, sampling, batching, made.advantage, 0, mesh
        )(variables, prompts, 0)
        reader = Reader(policy, made.readout)

        @jax.jit
        def read(variables, rollout):
            moment = moments(0, rollout, jnp.int32(0), jnp.int32(0))
            draws = corrupt(made.corruption, rollout, moment)
            return draws, reader(variables, rollout, draws, jnp.int32(0))

        draws, readouts = jax.device_get(read(variables, rollout))
    ended = np.asarray(rollout.commit_step) < 0
    assert ended.any() and not ended.all()
    assert set(rollout.extras) == {'log_prob', 'entropy', 'kept'}
    # Checkpoints are restored into these shapes.
    shapes = experience_shapes(made, batching, None, None, 4, sampling, policy.config.vocab_size)
    for array, expected in zip(jax.tree.leaves(rollout), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    assert not any(np.asarray(x)[ended].any() for x in rollout.extras.values())
    kept = np.unpackbits(np.asarray(rollout.extras['kept']), axis=-1).sum(-1)[~ended]
    assert kept.max() == 7 and kept.min() < 7
    target = np.asarray(draws.target)
    recorded = np.broadcast_to(np.asarray(rollout.extras['log_prob'])[:, None], target.shape)
    assert_allclose(np.asarray(readouts)[target], recorded[target], atol=1e-5)
    assert np.isfinite(readouts).all()


class NoReward:
    def reward(self, text, example):
        return 0.0


def test_settings_without_a_meaning_are_refused():
    for settings, message in (
        ({'importance': 'rank'}, 'agrpo.importance'),
        ({'states': 0}, 'agrpo.states is 0'),
    ):
        with pytest.raises(ValueError, match=message):
            objective_of('agrpo', **settings)


@pytest.mark.parametrize('change', [{'guidance': 1.0}, {'sampler': 'remask'}])
def test_samplers_whose_record_is_not_what_the_policy_gives_are_refused(change):
    sampling = SamplingConfig(32, 32, 8, temperature=1.0, commit='random')
    assert objective_of('agrpo', sampling=sampling).records
    with pytest.raises(ValueError, match="'agrpo' divides by the probabilities") as error:
        objective_of('agrpo', sampling=dataclasses.replace(sampling, **change))
    assert '\n' not in str(error.value)
