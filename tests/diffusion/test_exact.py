"""Enumerated laws and likelihoods, against plain Python that knows the rules from their words.

`walk` of `test_law_of_completions` follows every path of the sampler; likelihoods and bounds are
sums over all orders and all masks in float64.
"""

from functools import cache, partial
from itertools import combinations, permutations
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax.diffusion import bounds, exact, informed
from spg_jax.diffusion.corruption import Corruption
from spg_jax.diffusion.sampling import SamplingConfig
from tests.diffusion.test_law_of_completions import MASK, SYMBOLS, VOCABULARY, enumerated

pytestmark = pytest.mark.numerical

LENGTH = 4


def tables(length, seed=3):
    """The same random logits by state as `exact` counts states, and as `walk` does."""
    rng = np.random.default_rng(seed)
    states = exact.every_state(length, SYMBOLS, MASK)
    logits = 1.5 * rng.normal(size=(len(states), length, VOCABULARY)).astype(np.float32)
    by_tokens = np.zeros((VOCABULARY**length, length, VOCABULARY), np.float32)
    by_tokens[(states * VOCABULARY ** np.arange(length)).sum(-1)] = logits
    return logits, by_tokens


def decoding(commit, length=3, block_length=3, steps=3, **options):
    return SamplingConfig(
        length, steps, block_length, commit=commit, **{'temperature': 1.0, **options}
    )


@partial(jax.jit, static_argnums=1)
def law_of(logits, config):
    return exact.completion_law(logits, config, SYMBOLS, MASK)


def walked(table, config):
    """The law of completions by the walk over all paths, in the order of `every_completion`."""
    law = np.zeros(SYMBOLS**config.length)
    for (tokens, _), (probability, *_) in enumerated(table, config).items():
        law[sum(token * SYMBOLS**i for i, token in enumerate(tokens))] += probability
    return law


@pytest.mark.parametrize(
    'config',
    [
        decoding('low_confidence', steps=2, temperature=0.4),
        *(decoding(commit, steps=2) for commit in ('random', 'margin')),
        decoding('entropy', temperature=2.0, top_k=2, top_p=0.75),
        decoding('left_to_right', steps=2),
    ],
    ids=lambda config: f'{config.commit}-{config.steps}',
)
def test_the_law_of_completions_is_that_of_all_paths_and_sums_to_one(config):
    logits, by_tokens = tables(config.length)
    law = np.asarray(law_of(logits, config))
    assert_allclose(law.sum(), 1.0, rtol=1e-5)
    assert_allclose(law, walked(by_tokens, config), atol=1e-6)


def test_blocks_are_decoded_one_after_the_other():
    """With blocks of one position the law is a product from left to right, whatever the rule."""
    logits, by_tokens = tables(3)
    blocks = law_of(logits, decoding('low_confidence', block_length=1))
    in_order = walked(by_tokens, decoding('left_to_right'))
    assert_allclose(blocks, in_order, atol=1e-6)


def test_the_derivative_of_the_expected_reward_is_its_finite_difference():
    """In float64 by the walk; the order of confidences does not change over so small a step."""
    config = decoding('low_confidence')
    logits, by_tokens = tables(3)
    rng = np.random.default_rng(0)
    reward = rng.uniform(size=SYMBOLS**3)
    along = rng.normal(size=logits.shape).astype(np.float32)
    derivative = jax.jit(
        lambda along: jax.jvp(lambda x: law_of(x, config) @ reward, (logits,), (along,))[1]
    )(along)
    states = exact.every_state(3, SYMBOLS, MASK)
    rows = (states * VOCABULARY ** np.arange(3)).sum(-1)
    step = np.zeros(by_tokens.shape)
    step[rows] = along
    up, down = (walked(by_tokens + s * 1e-4 * step, config) @ reward for s in (1, -1))
    assert abs(derivative) > 1e-3
    assert_allclose(derivative, (up - down) / 2e-4, rtol=1e-3)


def token_table(seed=1):
    """log pi of the tokens of one completion under every mask, [2**C, C]."""
    prob = np.random.default_rng(seed).dirichlet(np.ones(3), size=(2**LENGTH, LENGTH))[..., 0]
    return np.log(prob).astype(np.float32)


def over_orders(logp, positions, masked):
    """log of the mean over all orders, in float64; `masked` is a set that stays masked."""
    values = []
    for order in permutations(positions):
        left, value = set(positions) | set(masked), 0.0
        for i in order:
            value += float(logp[sum(1 << j for j in left), i])
            left -= {i}
        values.append(np.exp(value))
    return np.log(np.mean(values))


def test_likelihoods_are_means_over_all_orders():
    logp = token_table()

    @jax.jit
    def likelihoods(logp):
        return exact.any_order(logp, range(4)), *(exact.block_wise(logp, b) for b in (2, 1))

    any_order, blocks_of_two, blocks_of_one = likelihoods(logp)
    assert_allclose(any_order, over_orders(logp, range(4), ()), rtol=1e-5)
    blocks = over_orders(logp, (0, 1), (2, 3)) + over_orders(logp, (2, 3), ())
    assert_allclose(blocks_of_two, blocks, rtol=1e-5)
    in_order = sum(logp[15 ^ ((1 << i) - 1), i] for i in range(4))
    assert_allclose(blocks_of_one, in_order, rtol=1e-5)


@pytest.mark.parametrize('block_length', [2, 4])
def test_bounds_are_sums_over_all_masks(block_length):
    logp, beta = token_table(), 1.5
    masks = exact.uniform_masks(LENGTH, block_length)
    assert_allclose(masks.probability.sum(), 1.0, rtol=1e-6)
    lower, upper = 0.0, np.zeros(LENGTH)
    for start in range(0, LENGTH, block_length):
        block = range(start, start + block_length)
        later = sum(1 << j for j in range(start + block_length, LENGTH))
        for size in range(1, block_length + 1):
            for chosen in combinations(block, size):
                weight = 1 / size / comb(block_length, size)
                for i in chosen:
                    value = float(logp[later + sum(1 << j for j in chosen), i])
                    lower += weight * value
                    upper[i] += weight * np.exp(beta * value)
    elbo = bounds.estimator('block' if block_length == 2 else 'released', 2).elbo
    within = block_length if block_length == 2 else 0

    @jax.jit
    def both(logp):
        eubo = exact.eubo_of_all_draws(logp, masks, beta, within)
        return exact.expected_elbo(logp, masks, elbo), eubo

    expected, eubo = both(logp)
    assert_allclose(expected, lower, rtol=1e-5)
    assert_allclose(eubo, np.log(upper).sum() / beta, rtol=1e-5)


INFLUENCE = np.array([0.3, 0.0, 1.0, 0.55], np.float32)


@cache
def informed_law(block_length):
    """The compiled masks and their law as a function of the strength."""
    return jax.jit(lambda strength: exact.informed_masks(INFLUENCE, block_length, strength))


def informed_masks(block_length, strength):
    return jax.tree.map(np.asarray, informed_law(block_length)(strength))


@pytest.mark.parametrize('block_length', [2, 4])
def test_informed_masks_without_strength_are_uniform_exactly(block_length):
    """d = 0: the same masks with the same probabilities, and so the same bounds."""
    plain = exact.uniform_masks(LENGTH, block_length)
    masks = informed_masks(block_length, 0.0)
    np.testing.assert_array_equal(masks.masked, plain.masked)
    assert_allclose(masks.probability, plain.probability, rtol=1e-6)


@pytest.mark.parametrize('block_length', [2, 4])
def test_informed_masks_are_those_that_the_corruption_draws(block_length):
    masks = informed_masks(block_length, 1.5)
    assert_allclose(masks.probability.sum(), 1.0, rtol=1e-5)
    kind = 'block' if block_length == 2 else 'uniform'
    corruption = Corruption(
        kind, 1, 2, prompt_rate=0.0, perturb_completion=False, informed=True, strength=1.5
    )
    draw = jax.jit(jax.vmap(corruption, (0, None, None, None)))
    drawn = draw(
        jax.random.split(jax.random.key(0), 20_000),
        jnp.zeros(0, bool),
        jnp.ones(LENGTH, bool),
        INFLUENCE,
    )
    bits = (np.asarray(drawn.masked[:, 0]) << np.arange(LENGTH)).sum(-1)
    expected = np.asarray(masks.probability)
    number = (masks.masked << np.arange(LENGTH)).sum(-1)
    # Two blocks may share a mask: everything from the second block on.
    law = np.bincount(number, expected, 16)
    assert_allclose(np.bincount(bits, minlength=16) / len(bits), law, atol=0.015)
    plain = np.bincount(number, exact.uniform_masks(LENGTH, block_length).probability, 16)
    assert np.abs(law - plain).max() > 0.03


def test_influence_along_an_order_is_the_change_of_confidences():
    """Positions are committed in the order 2, 0, 1; what is left is the last one's."""
    confidence = np.random.default_rng(4).uniform(size=(1, 8, 3)).astype(np.float32)
    orders = np.array([[2, 0, 1]])
    along = jax.jit(lambda c: exact.influence_along(c, orders, informed.WINDOW))
    influence = np.asarray(along(confidence))[0, 0]
    c = confidence[0]
    # Bit sets of what is masked: 111, 011 after position 2, 010 after position 0.
    expected = [abs(c[0b010, 1] - c[0b011, 1]), 0.0, np.abs(c[0b011, :2] - c[0b111, :2]).sum()]
    assert_allclose(influence, expected, rtol=1e-5)


def test_paths_and_completions_have_the_same_law():
    logits, by_tokens = tables(3)
    config = decoding('low_confidence')
    orders, joint = jax.jit(lambda x: exact.path_law(x, config, SYMBOLS, MASK))(logits)
    assert orders.shape == (6, 3)
    assert_allclose(joint.sum(-1), walked(by_tokens, config), atol=1e-6)
    outcomes = enumerated(by_tokens, config)
    for x, tokens in enumerate(exact.every_completion(3, SYMBOLS).tolist()):
        for o, order in enumerate(orders.tolist()):
            steps = tuple(order.index(i) for i in range(3))
            probability = outcomes.get((tuple(tokens), steps), (0.0,))[0]
            assert_allclose(joint[x, o], probability, atol=1e-6)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (decoding('random', temperature=0.0), 'sampling.temperature 0.0'),
        (decoding('random', guidance=1.0), 'sampling.guidance is 1.0'),
        (decoding('random', sampler='threshold'), "sampling.sampler is 'threshold'"),
        (decoding('entropy_bounded'), "sampling.commit is 'entropy_bounded'"),
        (decoding('low_confidence', schedule='timesteps'), "sampling.schedule 'timesteps'"),
    ],
)
def test_decoders_that_are_not_enumerated_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        exact.completion_law(tables(3)[0], config, SYMBOLS, MASK)


def test_toys_that_are_too_large_are_refused():
    with pytest.raises(ValueError, match='8 positions over 3 symbols have 65536 states'):
        exact.every_state(8, 3, 9)
