"""Plug-ins: closed forms by hand, neutral values, gradients in pieces, and every method with each.

The table of docs/own_method.md is made by the same table-driven check.
"""

import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from benchmarks import plug_ins as page
from benchmarks.adaptive_omega import best_omega
from spg_jax.assembly import assemble
from spg_jax.diffusion.corruption import Corruption, Draws
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.rl.advantages import group_advantages, leave_one_out, standardised
from spg_jax.rl.gradient import make_gradient
from spg_jax.rl.learner import kept_policies
from spg_jax.rl.objectives import REGISTRY, Batch, Loss, Objective
from spg_jax.rl.objectives.objective import configured
from spg_jax.rl.objectives.ratios import clipped, k2, k3
from spg_jax.rl.objectives.sequences import clipped_rows
from spg_jax.rl.packing import loss_of_idle
from spg_jax.rl.plug_ins import (
    ADVANTAGES,
    ComplementaryPairs,
    PlugIns,
    with_clip,
    with_kl,
    with_plug_ins,
)
from spg_jax.rl.scores import corrupt, moments
from tests.meshes import mesh_of
from tests.rl.conftest import random_rollout
from tests.rl.objectives.published import objective_of, published_rollout
from tests.rl.test_couplings import Config, Toy, inputs, joint_gradient, parameters, with_half
from tests.rl.test_couplings import objective_of as toy_objective

pytestmark = pytest.mark.numerical
GROUP, FULL = 4, 5  # FULL is the row whose 12 positions are all scored


def hand_batch(advantage=(1.0, -1.0), **others) -> Batch:
    """Two rows of two tokens, all masked in one draw; `others` are readouts [2, 1, 2]."""
    advantage = np.asarray(advantage, np.float32)
    rows = jax.tree.map(lambda x: np.asarray(x)[:2], random_rollout(length=2)).replace(
        scored=np.ones((2, 2), bool), reward=advantage, advantage=advantage
    )
    draws = Draws(masked=np.ones((2, 1, rows.prompt.shape[1] + 2), bool))
    others = {name: np.asarray(x, np.float32) for name, x in others.items()}
    return Batch(rows, draws, others, np.int32(0))


def reinforce(logp, batch):
    """-sum A l over the scored tokens."""
    value = jnp.where(batch.target, batch.advantage[:, None, None] * logp, 0.0)
    return Loss(-value.sum(), jnp.float32(len(logp)), {})


def simple(loss=reinforce, couples='row', **fields) -> Objective:
    corruption = configured(Corruption('uniform', draws=2, block_length=4))
    return Objective(corruption, 2, loss, couples, **fields)


def evaluated(objective, logp, batch):
    """The loss, its gradient by the readouts, and its metrics."""

    @jax.jit
    def evaluate(logp, batch):
        def value(logp):
            loss = objective.loss(logp, batch)
            return loss.total / loss.weight, loss.metrics

        return jax.value_and_grad(value, has_aux=True)(logp)

    (value, metrics), gradient = jax.device_get(evaluate(np.asarray(logp, np.float32), batch))
    return value, gradient, metrics


def value_and_gradient(objective, logp, batch):
    return evaluated(objective, logp, batch)[:2]


# --- advantages -----------------------------------------------------------------------------------


def test_baselines_in_closed_form(config):
    reward = np.asarray([1.0, 0.0, 0.0, 3.0, 2.0, 2.0, 2.0, 2.0], np.float32)
    centred = np.asarray([0.0, -1.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0], np.float32)
    expected = {
        'method': centred,
        'centred': centred,
        'leave_one_out': [0.0, -4 / 3, -4 / 3, 8 / 3, 0.0, 0.0, 0.0, 0.0],
        'standardised': centred / (np.sqrt(2.0) + 1e-4),
        'raw': reward,
    }
    functions = {}
    for name in expected:
        config.rl.advantage = name
        functions[name] = assemble(config).objective.advantage
    advantages = jax.jit(lambda x: {name: each(x, GROUP) for name, each in functions.items()})
    for name, values in advantages(reward).items():
        assert_allclose(values, expected[name], rtol=1e-6)


@pytest.mark.parametrize('size', [3, 6, 7, 10, 12])
def test_equal_rewards_are_no_signal_whatever_their_mean_in_float32(size):
    """The mean of equal numbers is not always that number."""
    rewards = [0.1 * n for n in range(32)] + [n / 7 for n in range(32)] + [n / 9 for n in range(32)]
    reward = np.repeat(np.asarray(rewards, np.float32), size)
    assert (reward != np.repeat(reward.reshape(-1, size).mean(1), size)).any()
    functions = (group_advantages, leave_one_out, partial(standardised, epsilon=1e-6))
    for values in jax.jit(lambda x: [each(x, size) for each in functions])(reward):
        assert (values == 0).all()


# --- divergence -----------------------------------------------------------------------------------


def test_estimators_and_their_gradients_in_closed_form():
    log_ratio = np.asarray([0.5, -0.25, 0.0], np.float32)  # log(other / policy)
    ratio = np.exp([0.5, -0.25, 0.0])

    @jax.jit
    def both(x):
        """Values and slopes, by log pi of the policy, with which the log-ratio falls."""
        slopes = [jax.grad(lambda x, k=k: k(-x).sum())(-x) for k in (k2, k3)]
        return k2(x), k3(x), *slopes

    value2, value3, slope2, slope3 = both(log_ratio)
    assert_allclose(value2, [0.125, 0.03125, 0.0], rtol=1e-6)
    assert_allclose(value3, ratio - 1 - np.log(ratio), rtol=1e-5, atol=1e-7)
    assert_allclose(slope2, [-0.5, 0.25, 0.0], rtol=1e-6)
    assert_allclose(slope3, 1 - ratio, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('estimator', ['k2', 'k3'])
def test_the_divergence_is_a_mean_per_token_in_each_unit_of_the_loss(estimator):
    """Rows of 2 and 1 tokens, which weigh 2 and 1 in the loss."""
    batch = hand_batch(reference=[[[-1.0, -2.0]], [[-1.5, -7.0]]])
    scored = np.asarray([[True, True], [True, False]])
    batch = batch.replace(rows=batch.rows.replace(scored=scored))

    def by_length(logp, batch):
        return reinforce(logp, batch).replace(weight=batch.scored.sum().astype(jnp.float32))

    logp = [[[-1.5, -1.8]], [[-1.0, -1.0]]]
    before, _ = value_and_gradient(simple(by_length), logp, batch)
    objective = with_kl(simple(by_length), 0.5, estimator, GROUP)
    after, gradient, metrics = evaluated(objective, logp, batch)
    x = np.asarray([0.5, -0.2, -0.5])  # log-ratios of the three tokens
    k = {'k2': 0.5 * x**2, 'k3': np.exp(x) - 1 - x}[estimator]
    assert_allclose(after - before, 0.5 * (2 * (k[0] + k[1]) / 2 + 1 * k[2]) / 3, rtol=1e-4)
    slope = {'k2': -x, 'k3': 1 - np.exp(x)}[estimator]
    expected = [[[-1.0, -1.0]], [[1.0, 0.0]]] + 0.5 * np.asarray(
        [[[slope[0], slope[1]]], [[slope[2], 0.0]]]
    )
    assert_allclose(gradient, expected / 3, rtol=1e-4)
    assert_allclose(metrics['kl_to_reference'], (k.sum(), 3.0), rtol=1e-4)


@pytest.mark.parametrize('name', ['d1', 'unigrpo'])
def test_it_is_the_divergence_that_methods_publish(config, name):
    """d1 takes it by group, unigrpo by token; each without its own, and ours in its place."""
    config = page.config_of(name)
    config.rl.update(group_size=4, prompts=2, microbatch=8)
    config[name].kl = 0.3
    published = assemble(config).objective
    config[name].kl, config.rl.kl = 0.0, 0.3
    plugged = assemble(config).objective
    rollout, rng = random_rollout(), np.random.default_rng(0)
    draws = Draws(masked=rng.random((8, 1, 16)) < 0.5)
    readouts = [np.float32(-3 * rng.random((8, 1, 12))) for _ in range(3)]
    others = {'behaviour': readouts[1], 'reference': readouts[2]}
    batch = Batch(rollout, draws, others, np.int32(0))
    expected, slope = value_and_gradient(published, readouts[0], batch)
    assert abs(expected) > 1e-3
    found, gradient = value_and_gradient(plugged, readouts[0], batch)
    assert_allclose(found, expected, rtol=1e-5)
    assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)


def test_the_reference_is_kept_only_where_every_parameter_is_trained(config):
    config.rl.kl = 0.1
    objective = assemble(config).objective
    assert objective.looks_at == ('reference',)
    assert kept_policies(objective, new_adapters=True) == []
    assert kept_policies(objective, new_adapters=False) == ['reference']


# --- clipping -------------------------------------------------------------------------------------

# Ratios 1.5, 1.1 and 0.5, 2 with the range 0.2, for A = 1 and A = -1.
LOGP, OLD = np.log([[[0.6, 0.55]], [[0.2, 0.8]]]), np.log([[[0.4, 0.5]], [[0.4, 0.4]]])


@pytest.mark.parametrize(
    ('clip', 'terms', 'slopes'),
    [
        ('ppo', [-1.2, -1.1, 0.8, 2.0], [0.0, -1.1, 0.0, 2.0]),
        ('unconditional', [-1.2, -1.1, 0.8, 1.2], [0.0, -1.1, 0.0, 0.0]),
    ],
)
def test_a_loss_without_ratios_becomes_the_clipped_surrogate(clip, terms, slopes):
    objective = with_clip(simple(), clip, 0.2)
    assert objective.behaviour
    batch = hand_batch(behaviour=OLD)
    value, gradient, metrics = evaluated(objective, LOGP, batch)
    # -A (l_old - 1) is what the surrogate leaves of the loss where r = 0.
    constant = -(np.asarray([[[1.0]], [[-1.0]]]) * (OLD - 1)).sum()
    assert_allclose(value, (sum(terms) + constant) / 2, rtol=1e-5)
    assert_allclose(gradient.reshape(-1), np.asarray(slopes) / 2, rtol=1e-5, atol=1e-7)
    stopped = {'ppo': 2, 'unconditional': 3}[clip]
    assert metrics['clip_share'] == (stopped, 4.0)
    # The functions of methods with ratios clip in the same way.
    advantage = np.float32([1.0, 1.0, -1.0, -1.0])
    surrogate = jax.jit(lambda ratios: -clipped(ratios, advantage, 0.2, clip=clip))
    assert_allclose(surrogate(np.float32(LOGP - OLD).reshape(-1)), terms, rtol=1e-5)


@pytest.mark.parametrize('clip', ['ppo', 'unconditional'])
def test_nothing_is_clipped_where_policies_are_equal(clip):
    batch = hand_batch(behaviour=OLD)
    value, gradient = value_and_gradient(simple(), OLD, batch)
    same, slope = value_and_gradient(with_clip(simple(), clip, 0.2), OLD, batch)
    assert value == same
    assert_allclose(slope, gradient, rtol=1e-6)


@pytest.mark.parametrize('clip', ['ppo', 'unconditional'])
def test_rows_that_are_not_read_out_are_not_clipped(clip):
    batch = hand_batch(advantage=(0.0, 0.0), behaviour=OLD)
    loss = with_clip(simple(), clip, 0.2).loss
    metrics = jax.jit(lambda: loss_of_idle(loss, batch, np.ones(2, bool), 1).metrics)()
    assert metrics['clip_share'] == (0.0, 4.0)


def test_ratios_of_rows_are_clipped_unconditionally():
    log_ratio = np.log(np.float32([1.5, 2.0]))
    batch = hand_batch(advantage=(1.0, -1.0))
    for clip, losses, share in (('ppo', [-1.2, 2.0], 1.0), ('unconditional', [-1.2, 1.2], 2.0)):
        clip_rows = jax.jit(clipped_rows, static_argnums=2)
        found, metrics = clip_rows(log_ratio, batch.replace(clip=clip), 0.2)
        assert_allclose(found, losses, rtol=1e-5)
        assert metrics['clip_share'][0] == share


# --- complementary masks --------------------------------------------------------------------------


@functools.cache
def many_pairs(kind: str, times: str) -> tuple[np.ndarray, Draws]:
    """(scored [B, C], draws [1500 updates, B, 4, ...]) of pairs in blocks of 4."""
    rollout, corruption = random_rollout(), Corruption(kind, draws=4, block_length=4, times=times)
    pairs = ComplementaryPairs(corruption)

    def draw(step):
        return corrupt(pairs, rollout, moments(0, rollout, step, jnp.int32(0)))

    draws = jax.jit(jax.vmap(draw))(jnp.arange(1500, dtype=jnp.int32))
    return np.asarray(rollout.scored), jax.tree.map(np.asarray, draws)


@pytest.mark.parametrize(('kind', 'times'), [('uniform', 'stratified'), ('block', 'independent')])
def test_a_pair_covers_each_position_of_its_region_once(kind, times):
    scored, draws = many_pairs(kind, times)
    masked = draws.masked[..., 4:]  # [updates, B, M, C]
    region = np.broadcast_to(scored[:, None], masked.shape[1:])
    outside = np.ones(masked.shape, bool)
    if kind == 'block':
        block_of_position = np.arange(scored.shape[1]) // 4
        region = region & (block_of_position == draws.block[..., None])
        later = block_of_position > draws.block[..., None]
        assert masked[later & scored[:, None]].all()
        outside = later
    assert masked[np.broadcast_to(~scored[:, None] & outside, masked.shape)].all()
    region = np.broadcast_to(region, masked.shape)
    first, second = masked[:, :, ::2], masked[:, :, 1::2]
    assert (region[:, :, ::2] == region[:, :, 1::2]).all()
    assert ((first ^ second) == region[:, :, ::2]).all()
    assert (first & region[:, :, ::2]).any(-1).all()  # as in any draw of the corruption
    assert (draws.masked[:, :, ::2, :4] == draws.masked[:, :, 1::2, :4]).all()


def test_each_position_is_masked_as_often_as_its_share():
    """The number k in the first draw is uniform over 1 to n, so that a position has (n + 1)/2n."""
    scored, draws = many_pairs('uniform', 'stratified')
    assert scored[FULL].all()
    first = draws.masked[:, FULL, ::2, 4:].reshape(-1, 12)
    number = first.sum(-1)
    assert stats.chisquare(np.bincount(number, minlength=13)[1:]).pvalue > 1e-3
    frequency = first.sum(0)
    assert_allclose(frequency.mean() / len(first), 13 / 24, atol=0.02)
    # Positions of a draw that masks k of 12 are exchangeable: the sum of squares has 11 degrees of
    # freedom after this scale.
    variance = (number / 12 * (1 - number / 12)).sum() * 12 / 11
    statistic = np.square(frequency - frequency.mean()).sum() / variance
    assert 1e-3 < stats.chi2.sf(statistic, 11) < 1 - 1e-3


def test_stratified_times_are_spread_over_the_pairs():
    """Of two pairs one masks at most half of the positions first, and the other one more."""
    _, draws = many_pairs('uniform', 'stratified')
    counts = draws.masked[:, FULL, ::2, 4:].sum(-1)  # [updates, 2], 1 to 12
    assert (np.sort(counts, axis=1)[:, 0] <= 6).all() and (np.sort(counts, axis=1)[:, 1] > 6).all()


def test_one_pair_estimates_the_elbo_without_bias(config):
    """The mean over all pairs of two positions, weighed as they are drawn, is the exact ELBO."""
    config.corruption.update(kind='uniform', draws=2, complementary=True, prompt_rate=0.0)
    objective = assemble(config).objective
    # log-probabilities of two tokens, seen (the other one is clean) or unseen.
    seen, unseen = np.asarray([-0.5, -0.7]), np.asarray([-1.1, -2.0])
    exact = 0.5 * (seen + unseen).sum()
    both = [[True, True], [False, False]]
    cases = [([[True, False], [False, True]], 0.25), ([[False, True], [True, False]], 0.25)]
    elbo_of = jax.jit(lambda logp, batch: objective.loss(logp, batch).metrics['elbo'][0])
    total = 0.0
    for masked, probability in [*cases, (both, 0.5)]:
        masked = np.asarray(masked)
        logp = np.where(masked.sum(1, keepdims=True) == 2, unseen, seen)[None]
        batch = hand_batch()
        batch = batch.replace(
            rows=jax.tree.map(lambda x: x[:1], batch.rows),
            draws=Draws(
                masked=np.concatenate([np.zeros((2, 4), bool), masked], 1)[None],
                block=np.zeros((1, 2), np.int32),
            ),
        )
        total += probability * float(elbo_of(np.float32(logp), batch))
    assert_allclose(total, exact, rtol=1e-5)


# --- the share of the EUBO, which was tried and left out ------------------------------------------


def test_the_best_omega_minimises_the_variance_over_redraws():
    rng = np.random.default_rng(0)
    lower, other = rng.normal(size=(2, 50, 3)) * [1.0, 2.0, 3.0]
    difference = other - 0.3 * lower  # of the bounds' gradients, correlated with that of the ELBO
    omega, each = best_omega(lower, difference)

    def variance(omega):
        return (lower + omega * difference).var(0)

    for step in (-0.01, 0.01):
        assert variance(omega).sum() < variance(omega + step).sum()
        assert (variance(each) < variance(each + step)).all()
    assert variance(each).sum() < variance(omega).sum()


# --- together -------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['spg', 'd1', 'examples.own_objective'])
def test_neutral_values_leave_the_objective_itself(name):
    config = page.config_of(name)
    batching = assemble(config).batching
    objective = assemble(config).objective
    assert with_plug_ins(objective, PlugIns(), name, batching) is objective
    assert with_plug_ins(objective, PlugIns(kl_estimator='k2', clip_range=0.5), name, batching) is (
        objective
    )


@pytest.mark.parametrize(
    ('couples', 'pieces'),
    [('row', (4, 1)), ('group', (4, 0))],  # No method of the registry couples a whole batch.
)
def test_gradients_in_pieces_are_the_joint_one_with_all_plug_ins(couples, pieces):
    """By microbatches and passes over draws, to 1e-5; by adapters the base is the reference."""
    policy, objective = Toy(Config(None)), toy_objective(couples)
    objective = with_kl(with_clip(objective, 'ppo', 0.2), 0.7, 'k3', GROUP)
    loss, gradient = joint_gradient(policy, objective)
    microbatch, draws_per_pass = pieces
    in_pieces = make_gradient(
        policy, objective, microbatch=microbatch, draws_per_pass=draws_per_pass, group_size=GROUP
    )
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        trained = parameters(False, mesh)
        rollout, draws, others = inputs(mesh)
        found_loss, found, _ = jax.jit(with_half(in_pieces))(trained, {}, rollout, draws, others)
    assert_allclose(found_loss, loss, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for leaf, expected in zip(
        jax.tree.leaves(found['params']), jax.tree.leaves(gradient), strict=True
    ):
        assert_allclose(np.asarray(leaf), expected, rtol=0, atol=1e-5 * largest)


refusal = functools.cache(page.refusal)


@pytest.mark.parametrize('name', sorted(REGISTRY))
def test_every_method_admits_a_plug_in_or_says_why_not(name):
    for key, value in page.PLUG_INS:
        message = refusal(name, key, value)
        if message:
            start = f'{key} is {value!r}, which has no meaning for rl.objective {name!r}: '
            assert message.startswith(start) and '\n' not in message
            continue
        objective = assemble(page.config_of(name, **{key: value})).objective
        if key == 'rl.advantage':
            assert objective.advantage is ADVANTAGES[value]
        elif key == 'rl.kl':
            assert 'reference' in objective.looks_at and 'reference' in objective.kept
        elif key == 'rl.clip':
            assert objective.behaviour or name == 'agrpo'  # whose sampler recorded it
        else:
            assert isinstance(objective.corruption, ComplementaryPairs)


# What the methods need beside their published settings: no divergence and ratios of their own.
CHANGES = {
    **{name: {'kl': 0.0} for name in ('coupled_grpo', 'd1', 'd2', 'espo', 'tracerl')},
    'unigrpo': {'kl': 0.0, 'masking': 'random', 'masks': 2},
    'just_grpo': {'epsilon': 0.2},
}


# How far the log-probability of each token has moved, where e-fold ratios would be too much.
SHIFTS = {'ebpo': 0.02}


# The divergence is added to a loss, whatever the method, by the rows or groups that it couples.
WITH_KL = ('spg', 'vrpo')
# Methods that refuse `rl.clip`, and those that edit.
UNCLIPPED = {'autoedit', 'bgpo', 'dtm', 'gdsd', 'rspo'}


@pytest.mark.parametrize('name', sorted({*REGISTRY} - UNCLIPPED))
def test_admitted_plug_ins_change_the_loss_of_every_method(name):
    """On draws of the method; the ratios of some rows have left the range on either side."""
    rng, length = np.random.default_rng(0), 32
    left_to_right = SamplingConfig(length, length, 8, 1.0, commit='left_to_right')
    sampling = left_to_right if name == 'just_grpo' else None
    objective = objective_of(name, sampling=sampling, **CHANGES.get(name, {}))
    logp = np.float32(-1 - 3 * rng.random((6, objective.draws, length)))
    shift = np.float32([1.0, 1.0, -1.0, -1.0, 1.0, -1.0])[:, None, None]
    shift = shift * np.float32(SHIFTS.get(name, 1.0))
    extras = {
        'agrpo': {
            'log_prob': (logp - shift)[:, 0],
            'entropy': rng.random((6, length)),
            'kept': np.ones((6, length, 1), bool),
        },
        'dmpo': {'log_ratio': rng.random(6)},
        'tracerl': {'kept': np.ones(6, bool)},
    }
    reward = np.asarray([0.0, 1.0, 0.0, 1.0, 0.0, 0.0], np.float32)
    rollout = published_rollout(reward=reward, **extras.get(name, {}))
    batching = assemble(page.config_of(name)).batching
    batching = dataclasses.replace(batching, group_size=6, prompts=1, microbatch=6, inner_updates=2)
    trials = [PlugIns()]
    if name in WITH_KL:
        trials.append(PlugIns(kl=1.0))
    if 'rl.clip' not in objective.refuses:
        trials.append(PlugIns(clip='unconditional'))
    losses = [with_plug_ins(objective, trial, name, batching).loss for trial in trials]
    others = {'behaviour': logp - shift, 'reference': logp + np.float32(0.5)}

    @jax.jit
    def evaluate(logp, rollout, others):
        rollout = rollout.replace(advantage=objective.advantage(rollout.reward, 6))
        moment = moments(0, rollout, jnp.int32(0), jnp.int32(0))
        draws = corrupt(objective.corruption, rollout, moment)
        batch = Batch(rollout, draws, others, jnp.int32(0))

        def value(logp, loss):
            result = loss(logp, batch)
            return result.total / result.weight

        return [jax.value_and_grad(value)(logp, loss) for loss in losses]

    (plain, slope), *changed = jax.device_get(evaluate(logp, rollout, others))
    assert changed
    for value, gradient in changed:
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert abs(value - plain) > 1e-5 * abs(plain)
        assert np.abs(gradient - slope).max() > 1e-3 * np.abs(slope).max() > 0


def test_which_methods_admit_what():
    """The decisions, typed here a second time."""
    refusing = {
        (key, value): {name for name in REGISTRY if refusal(name, key, value)}
        for key, value in page.PLUG_INS
    }
    own_weights = {'dmpo', 'dtm', 'vrpo', 'wd1'}
    for value in ('centred', 'leave_one_out', 'standardised'):
        assert refusing['rl.advantage', value] == own_weights
    assert refusing['rl.advantage', 'raw'] == own_weights | {'gdsd', 'rspo'}
    own_kl = {'coupled_grpo', 'd1', 'd2', 'espo', 'gdsd', 'tracerl', 'unigrpo'}
    assert refusing['rl.kl', 0.1] == own_kl | {'dtm'}
    for value in ('ppo', 'unconditional'):
        own_clip = {'bgpo', 'dtm', 'gdsd', 'just_grpo', 'rspo', 'vrpo'}
        assert refusing['rl.clip', value] == own_clip
    assert refusing['corruption.complementary', True] == {*REGISTRY} - {'spg'}
    for name in own_kl:
        assert page.refusal(name, 'rl.kl', 0.1, **{f'{name}.kl': 0.0}) is None
    assert page.refusal('just_grpo', 'rl.clip', 'ppo', **{'just_grpo.epsilon': 0.2}) is None
    for key, value in page.PLUG_INS:
        assert page.refusal('examples.own_objective', key, value) is None


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'rl.advantage': 'centered'}, "rl.advantage is 'centered', perhaps centred; use one of"),
        ({'rl.kl_estimator': 'k1'}, "rl.kl_estimator is 'k1'; use one of k2, k3"),
        ({'rl.clip': 'unconditionaly'}, 'perhaps unconditional; use one of method, ppo, uncond'),
        ({'rl.kl': -0.1}, 'rl.kl is -0.1; use a weight of at least 0'),
        ({'rl.clip_range': 1.0}, 'rl.clip_range is 1.0; use a number between 0 and 1'),
        ({'rl.clip': 'ppo', 'rl.inner_updates': 1}, 'rl.inner_updates is 1, with which every'),
        ({'rl.advantage': 'raw', 'spg.baseline': 'each'}, "spg.baseline 'each' needs advantages"),
        (
            {'corruption.complementary': True, 'corruption.draws': 3},
            "rl.objective 'spg': corruption.draws is 3, which makes no pairs; use 4",
        ),
        (
            {'corruption.complementary': True, 'corruption.kind': 'block_full'},
            'it masks all of its region',
        ),
        (
            {'corruption.complementary': True, 'corruption.informed': True},
            'corruption.informed chooses which positions are masked',
        ),
    ],
)
def test_what_has_no_meaning_is_one_line(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        assemble(page.config_of('spg', **changes))
    assert '\n' not in str(error.value)


def test_a_method_that_handles_the_sampling_policy_itself_is_not_clipped_silently(config):
    batching = assemble(config).batching
    objective = simple(behaviour=True)
    with pytest.raises(ValueError, match="'ppo'.*'mine': .*in a way of its own"):
        with_plug_ins(objective, PlugIns(clip='ppo'), 'mine', batching)


def test_the_page_has_the_present_table(monkeypatch):
    monkeypatch.setattr(page, 'refusal', refusal)  # which remembers what the tests above asked
    text = page.PAGE.read_text()
    remedy = 'run `python -m benchmarks.plug_ins --write`'
    assert page.with_table(text) == text and '| examples.own_objective |' in text, remedy
