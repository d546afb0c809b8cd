"""The estimator microscope: its truths against enumeration in the test, and its figures against
what theory says about methods that are known."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from numpy.testing import assert_allclose

from spg_jax import microscope
from spg_jax.diffusion import bounds, exact
from spg_jax.rl import toy_bounds, toy_directions, toys
from spg_jax.rl.toy_directions import compare

GROUP = microscope.GROUP_SIZE
OWN = 'examples.own_objective'


@pytest.fixture(scope='module')
def learned():
    """The parameters of one toy that has learned for a few steps."""
    return toys.learn(range(1), steps=20)


@pytest.fixture(scope='module')
def known(learned):
    """That toy alone; what it has learned is not learned again."""

    def learn(seeds, steps):
        assert (seeds, steps) == (range(1), 20)
        return learned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toys, 'learn', learn)
        return toys.make_toys(range(1), 'answer', steps=20)


@pytest.fixture(scope='module')
def usual():
    """The parts of SPG with the ELBO for both signs, under uniform masks."""
    subject = microscope.Subject(
        'settings', 'ELBO', 'spg', microscope.UNIFORM_ELBO, microscope.CONFIDENCE
    )
    return microscope.parts_of(subject)


@pytest.fixture(scope='module')
def samples(known, usual):
    decoding = microscope.decoding_of(usual)
    return toy_directions.make_samples(known, decoding, usual.batching, updates=1024)


def test_the_table_is_the_transformer_and_its_jacobian_the_derivative(known, learned):
    """Moving the parameters of the transformer moves its logits as the Jacobian says."""
    (toy,), policy = known, toys.network()
    params = jax.tree.map(lambda x: x[0], learned)
    along = np.random.default_rng(0).normal(size=toy.jacobian.shape[1]).astype(np.float32)
    along /= np.linalg.norm(along)
    moves = np.stack([0 * along, 1e-2 * along, -1e-2 * along])

    def tables(params, moves):
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        return jax.lax.map(lambda x: toys.table_of_network(policy, unravel(flat + x)), moves)

    table, above, below = np.asarray(toys.quick(tables, params, moves)(params, moves))
    assert_allclose(table, toy.table, atol=1e-4)
    slope = (above - below) / 2e-2
    predicted = (np.asarray(toy.jacobian) @ along).reshape(slope.shape)
    assert np.abs(predicted).max() > 0.1
    assert_allclose(slope, predicted, atol=0.02 * np.abs(predicted).max())


def test_the_sampler_draws_what_is_enumerated(known, samples, usual):
    law = np.asarray(toys.laws(known[0].table, microscope.decoding_of(usual)))
    assert_allclose(law.sum(-1), 1.0, rtol=1e-5)
    completion = np.asarray(samples[0].rollouts.completion)  # [U, B, C]
    index = (completion * toys.SYMBOLS ** np.arange(toys.LENGTH)).sum(-1)
    for prompt in range(toys.PROMPTS):
        rows = index[:, prompt * GROUP : (prompt + 1) * GROUP].reshape(-1)
        expected = len(rows) * law[prompt]
        counts = np.bincount(rows, minlength=law.shape[1])
        assert not counts[law[prompt] == 0].any()
        common = expected >= 5
        statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
        assert statistic < common.sum() + 5 * np.sqrt(2 * common.sum())
    reward = np.asarray(samples[0].rollouts.reward)
    sums = completion.sum(-1) % toys.SYMBOLS
    np.testing.assert_array_equal(reward, sums == np.repeat(np.arange(toys.PROMPTS), GROUP))


def test_the_true_gradient_is_the_finite_difference_of_the_expected_reward(known, samples, usual):
    """Along the gradient itself, through the transformer's Jacobian."""
    toy, decoding = known[0], microscope.decoding_of(usual)
    gradient = samples[0].gradient
    along = gradient / np.linalg.norm(gradient)
    move = np.asarray(toy.jacobian @ along).reshape(toy.table.shape)
    expected_reward = jax.jit(lambda t: (toys.laws(t, decoding) * toy.reward).sum(-1).mean())
    step = 3e-3 / np.abs(move).max()
    rise = expected_reward(toy.table + step * move) - expected_reward(toy.table - step * move)
    assert_allclose(rise / (2 * step), np.linalg.norm(gradient), rtol=0.02)


def test_reinforce_with_the_exact_likelihood_points_along_the_true_gradient(samples):
    direction = toy_directions.of_exact_likelihood(samples)
    assert abs(direction.cosine - 1.0) < 4 * direction.error and direction.error < 0.1
    assert direction.single < 0.9


def test_the_mean_update_of_the_elbo_is_what_enumeration_gives(known, samples, usual):
    """Released ELBO under uniform masks: unbiased, so that its mean update is an exact sum.

    The update is -(gradient of loss) = sum_j A_j ELBO_j / sum_j n_j, with E over groups of
    A_j f(x_j) = (G - 1) Cov(R, f) for the sum over a group of G.
    """
    toy, decoding = known[0], microscope.decoding_of(usual)
    updates, policy = 256, toys.as_table(toys.network())
    rollouts = jax.tree.map(lambda x: np.asarray(x)[:updates], samples[0].rollouts)
    arguments = toy.table, rollouts, np.arange(updates, dtype=np.uint32)
    directions = toys.quick(
        toy_directions.make_directions(policy, usual.objective, usual.batching), *arguments
    )
    rows = np.asarray(directions(*arguments)).mean(1) @ np.asarray(toy.jacobian)  # [U, W]
    masks = exact.uniform_masks(toys.LENGTH, toys.LENGTH)
    law = np.asarray(toys.laws(toy.table, decoding))
    reward = np.asarray(toy.reward)
    weight = law * (reward - (law * reward).sum(-1, keepdims=True))
    weight *= (GROUP - 1) / (toys.PROMPTS * GROUP * toys.LENGTH)

    # The objective is a sum over prompts, states, places and tokens of these weights times log pi.
    logits = np.asarray(toy.table, np.float64)[: toys.PROMPTS]  # [Q, N, C, V]
    weights = np.zeros_like(logits)
    prompts = np.arange(toys.PROMPTS)[:, None]
    tokens = exact.every_completion(toys.LENGTH, toys.SYMBOLS)
    for mask, chance in zip(masks.masked, np.asarray(masks.probability), strict=True):
        states = exact.masked_states(toys.LENGTH, toys.SYMBOLS)[
            :, (mask << np.arange(toys.LENGTH)).sum()
        ]
        for i in np.flatnonzero(mask):
            share = chance * toys.LENGTH / mask.sum() * weight  # [Q, X]
            np.add.at(weights, (prompts, states[None], i, tokens[None, :, i]), share)
    policy_law = np.exp(logits - logits.max(-1, keepdims=True))
    policy_law /= policy_law.sum(-1, keepdims=True)
    expected = np.zeros(toy.table.shape)
    # The derivative of log softmax is one for the token itself, less the probability of each.
    expected[: toys.PROMPTS] = weights - weights.sum(-1, keepdims=True) * policy_law
    expected = expected.reshape(-1)
    expected = expected @ np.asarray(toy.jacobian)
    mean, error = rows.mean(0), rows.std(0) / np.sqrt(updates)
    scores = (mean - expected) / np.maximum(error, 1e-12)
    assert np.abs(scores).max() < 5 and 0.7 < np.sqrt((scores**2).mean()) < 1.4
    # A wrong mean would be seen: without the factor (G - 1) / G it is already off.
    along = expected / np.linalg.norm(expected)
    assert (mean @ along) / (rows @ along).std() * np.sqrt(updates) > 3


def test_comparison_of_updates_takes_noise_apart():
    """Updates g + group noise + draw noise, whose cosines are known."""
    rng = np.random.default_rng(0)
    true, other = np.zeros(50), np.zeros(50)
    true[0], other[1] = 1.0, 0.75
    group = rng.normal(size=(4000, 1, 50)) * 0.2  # squared norm 2
    draws = rng.normal(size=(4000, 2, 50)) * 0.4  # squared norm 8
    updates = true + other + group + draws
    result = compare(updates, 3.0 * true, passes=4.0)
    signal = 1.0 + 0.75**2
    steady = compare(updates, 3.0 * true, passes=4.0, noise=-2.0 * group[:, 0])
    assert_allclose(steady.cosine, 1 / np.sqrt(signal), atol=4 * steady.error)
    assert steady.error < 0.95 * result.error
    assert_allclose(steady[3:], result[3:], rtol=0.02)
    assert_allclose(result.cosine, 1 / np.sqrt(signal), atol=4 * result.error)
    assert result.error < 0.02
    assert_allclose(result.endless, 1 / np.sqrt(signal + 2), rtol=0.03)
    assert_allclose(result.budget, 1 / np.sqrt(signal + 2 + 8 * 4 / 16), rtol=0.03)
    assert_allclose(result.single, 1 / np.sqrt(signal + 10), rtol=0.05)


def test_forward_passes_are_counted(samples):
    one = jax.tree.map(lambda x: x[0], samples[0].rollouts)

    def passes(name):
        subject = microscope.Subject('methods', name, name, {}, microscope.CONFIDENCE)
        parts = microscope.parts_of(subject)
        return toy_directions.passes(parts.objective, parts.batching, one)

    # d1 reads its one draw for policy, behaviour and reference; dmpo four draws, and at arrival
    # four for each of two policies, spread over two updates; dtm one, for itself and the teacher.
    assert [passes(name) for name in ('spg', 'd1', 'dmpo', 'dtm')] == [2, 3, 4 + 8 / 2, 2]


@pytest.mark.parametrize('objective', [OWN, 'just_grpo'])
def test_own_objectives_and_those_with_another_decoder_are_measured(objective):
    subject = microscope.Subject('methods', objective, objective, {}, microscope.CONFIDENCE)
    measured, parts = microscope.with_decoder(subject)
    needs_order = objective == 'just_grpo'
    assert measured.decoder == (microscope.LEFT_TO_RIGHT if needs_order else subject.decoder)
    assert parts.sampling.length == toys.LENGTH


def test_unknown_objectives_and_settings_are_refused_in_one_line():
    for objective, settings, message in (
        ('spq', {}, "rl.objective is 'spq': use spg"),
        ('spg', {'spg.betta': 1.0}, 'no setting spg.betta; use spg.beta'),
    ):
        subject = microscope.Subject('methods', 'x', objective, settings, microscope.CONFIDENCE)
        with pytest.raises(ValueError, match=message):
            microscope.with_decoder(subject)


def ratio_of_mean_gradients(toy, usual):
    """|mean of the gradient of EUBO 4 - ELBO| over |mean of that of the ELBO|, uniform masks, by
    differentiating the means themselves."""
    law = toys.laws(toy.table, microscope.decoding_of(usual))  # [Q, X]
    masks = exact.uniform_masks(toys.LENGTH, toys.LENGTH)
    estimator = bounds.estimator('released', toys.LENGTH)

    def means(table, prompt):
        logp = exact.token_table(jax.nn.log_softmax(table[prompt]), toys.LENGTH, toys.SYMBOLS)
        lower = jax.vmap(lambda x: exact.expected_elbo(x, masks, estimator.elbo))(logp)
        upper = jax.vmap(lambda x: exact.eubo_of_all_draws(x, masks, 4.0))(logp)
        return law[prompt] @ lower, law[prompt] @ (upper - lower)

    squares = np.zeros(2)
    for prompt in range(toys.PROMPTS):
        slopes = jax.jit(jax.jacrev(means), static_argnums=1)(toy.table, prompt)
        squares += [((x.reshape(-1) @ toy.jacobian) ** 2).sum() for x in slopes]
    return (squares[1] / squares[0]) ** 0.5


def test_bounds_lie_where_theory_puts_them(known, usual, monkeypatch):
    """Of all estimates one of each kind, because each takes long to compile. That informed masks of
    strength 0 are plain ones is in tests/diffusion/test_exact.py."""
    every_estimate = toy_bounds.every_estimate

    def estimates(block_length):
        wanted = {('EUBO 4', 'uniform'), ('ELBO', 'uniform')}
        wanted |= {('ELBO', 'block'), ('ELBO', 'block, informed d=3')}
        likelihoods, bounds = every_estimate(block_length)[:2], every_estimate(block_length)[2:]
        return likelihoods + [each for each in bounds if (each.name, each.masks) in wanted]

    monkeypatch.setattr(toy_bounds, 'every_estimate', estimates)
    monkeypatch.setattr(toy_bounds, 'STRENGTHS', (3.0,))
    rows = {
        (row.name, row.masks): row
        for row in toy_bounds.measure(known, microscope.decoding_of(usual))
    }
    exact_rows = [rows['log p', masks] for masks in ('decoder', 'random order', 'blocks')]
    assert [row.over_decoder for row in exact_rows][0] == 0.0
    assert_allclose(exact_rows[0].drift, 0.0, atol=1e-4)  # E grad log p = 0 under its own law
    assert_allclose([exact_rows[1].cosine_random, exact_rows[2].cosine_blocks], 1.0, rtol=1e-5)
    assert rows['ELBO', 'uniform'].over_random <= 1e-5
    assert rows['ELBO', 'block'].over_blocks <= 1e-5
    assert rows['EUBO 4', 'uniform'].over_random >= -1e-5  # beta = n
    lower, upper = rows['ELBO', 'uniform'], rows['EUBO 4', 'uniform']
    assert lower.apart == 0.0
    assert_allclose(upper.apart / lower.drift, ratio_of_mean_gradients(known[0], usual), rtol=1e-4)
    informed = rows['ELBO', 'block, informed d=3']
    assert abs(informed.value - rows['ELBO', 'block'].value) > 1e-4


@pytest.fixture
def parsed():
    """A function that gives the command's flags the values of a command line."""
    before = set(flags.FLAGS)
    microscope.define_flags()
    yield lambda *arguments: flags.FLAGS(['microscope', *arguments])
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_the_command_measures_an_objective_of_a_users_own(
    tmp_path, monkeypatch, known, samples, usual, parsed, capsys
):
    """The whole command, except that it gets the toy and the samples that other tests check."""

    def make_toys(seeds, reward, steps):
        assert (seeds, reward, steps) == (range(1), 'answer', 20)
        return known

    def make_samples(toys, decoding, batching, updates):
        assert toys is known and updates == 16
        assert (decoding, batching) == (microscope.decoding_of(usual), usual.batching)
        (sample,) = samples
        rollouts = jax.tree.map(lambda x: x[:updates], sample.rollouts)
        return [sample._replace(rollouts=rollouts, noise=sample.noise[:updates])]

    monkeypatch.setattr(toys, 'make_toys', make_toys)
    monkeypatch.setattr(toy_directions, 'make_samples', make_samples)
    monkeypatch.setattr(microscope.cli, 'compile_cache', lambda: None)  # The tests have their own.
    parsed('--smoke', f'--objectives={OWN}', f'--out={tmp_path}')
    microscope.main([])
    output = capsys.readouterr().out
    last = json.loads(output.splitlines()[-1])
    assert last['toys'] == 1 and 'at 16 passes' in output.replace('\n', ' ')
    records = [json.loads(line) for line in (tmp_path / 'microscope.jsonl').open()]
    assert [record['name'] for record in records] == ['exact likelihood', OWN]
