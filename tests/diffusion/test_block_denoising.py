"""Block diffusion against published numbers, and against a model that sees one block at a time."""

import dataclasses
from fractions import Fraction
from functools import partial
from math import comb
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.diffusion.block_denoising import (
    Masks,
    draw_masks,
    embedding_noise,
    entropy_where_right,
    streams,
    weighted_loss,
)
from spg_jax.diffusion.denoising import denoising_loss, stratified_masks
from spg_jax.models.transformer import Transformer, TransformerConfig
from tests.parameters import random_params

pytestmark = pytest.mark.numerical

FORMULAS = np.load(
    Path(__file__).parents[1] / 'reference' / 'families' / 'formulas' / 'formulas.npz'
)
MASK = 9
# Operation by operation they would compile a program for each.
drawn_masks = jax.jit(draw_masks, static_argnames='complementary')
loss_of, noise_of = jax.jit(weighted_loss), jax.jit(embedding_noise, static_argnums=2)
MODEL = TransformerConfig(10, 16, 2, 2, 1, 32, tie_embeddings=True)


@pytest.fixture(scope='module')
def params():
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, random_params(Transformer(MODEL)))


def keys(rows, seed=0):
    return jax.random.key(seed), jax.random.split(jax.random.key(seed + 100), rows)


def test_the_weighted_loss_is_the_published_one():
    logits, clean, masked, maskable, t = (
        jnp.asarray(FORMULAS[f'loss/{name}'])
        for name in ('logits', 'clean', 'masked', 'maskable', 't')
    )
    masks = Masks(masked, 1 / (t * maskable.sum(1)))
    assert_allclose(loss_of(logits, clean, masks), FORMULAS['loss/inv_t'], atol=2e-5)


@jax.jit
@partial(jax.value_and_grad, has_aux=True)
def of_entropy(logits, clean, masked, weight, beta):
    entropy = entropy_where_right(logits, clean, masked)
    return weighted_loss(logits, clean, Masks(masked, weight)) + beta * entropy, entropy


@pytest.mark.parametrize('case', ['some_right', 'none_right', 'all_ignored'])
def test_the_entropy_of_right_predictions_and_its_gradient(case):
    published = {
        name.rpartition('/')[2]: FORMULAS[name]
        for name in FORMULAS
        if name.startswith(f'cap/{case}/')
    }
    labels, beta = published['labels'], FORMULAS['cap/beta']
    masked, clean = labels >= 0, np.maximum(labels, 0)
    weight = np.full(2, 2.0, np.float32) / max(1, masked.sum())  # the mean over all masked tokens

    (loss, entropy), gradient = of_entropy(published['logits'], clean, masked, weight, beta)
    assert_allclose(entropy, published['entropy_mean_right'], atol=2e-5)
    assert_allclose(loss, published['total'], atol=2e-5)
    assert_allclose(gradient, published['grad_logits'], atol=1e-6)


def test_entropy_by_hand():
    """Two right of three masked tokens: a uniform prediction over two ids, and a certain one."""
    even, sure = [5.0, 5.0, -50.0], [50.0, -50.0, -50.0]
    logits = jnp.asarray([[even, sure, sure, even]])
    clean = jnp.asarray([[0, 0, 1, 0]])
    masked = jnp.asarray([[True, True, True, False]])
    entropy = jax.jit(entropy_where_right)(logits, clean, masked)
    assert_allclose(entropy, np.log(2) / 2, rtol=1e-5)


def test_the_whole_length_is_masked_diffusion():
    """Same masks, same loss and same input as in the training of base policies."""
    key, row_keys = keys(6)
    masks = drawn_masks(key, row_keys, jnp.ones((6, 5), bool), complementary=False)
    assert_array_equal(masks.masked, stratified_masks(key, row_keys, 5))
    rng = np.random.default_rng(0)
    logits, clean = (
        jnp.asarray(rng.normal(size=(6, 5, 12))),
        jnp.asarray(rng.integers(0, 12, (6, 5))),
    )
    expected = jax.jit(denoising_loss)(logits, clean, masks.masked)
    assert_allclose(loss_of(logits, clean, masks), expected, rtol=1e-6)
    valid = jnp.ones((6, 5), bool)
    tokens, visible = streams(clean + 1, clean, valid, None, 0)
    assert_array_equal(tokens, clean + 1)
    assert_array_equal(visible, valid)


def test_a_pair_masks_each_token_once_and_weighs_as_single_masks_do():
    rows = 6
    maskable = jnp.arange(8)[None, :] >= jnp.full((rows, 1), 3)  # n = 5
    masks = drawn_masks(*keys(rows), maskable, complementary=True)
    masked = np.asarray(masks.masked).reshape(rows, 2, 8)
    assert_array_equal(masked.sum(1), maskable)
    counts = masked.sum(2)
    assert sorted(counts[:, 0]) == [0, 1, 2, 3, 4, 5]
    weight = np.asarray(masks.weight).reshape(rows, 2)
    # Of 6 draws of k one has k = 1, of the 5 draws without complements as well.
    assert_allclose(weight[counts > 0] * 5 / 6, 1 / counts[counts > 0], rtol=1e-6)
    assert_array_equal(weight[counts == 0], 0)


def test_counts_weigh_the_tokens_of_a_block_as_times_do():
    """For 2 of the 3 tokens of a block in a sequence of 7, both sides as fractions."""
    n, m, a = 7, 3, 2
    by_counts = sum(Fraction(comb(n - m, k - a), k * comb(n, k)) for k in range(a, n - m + a + 1))
    by_times = Fraction(1, a * comb(m, a))  # the integral of t^(a-1) (1-t)^(m-a)
    assert by_counts == by_times


LENGTH = 8
MODELS = {block: dataclasses.replace(MODEL, visible_block=block) for block in (0, 1, 4)}


def log_prob(params, block, clean, noisy, position):
    """log p(token | what its block knows, earlier blocks), by a model that sees no later block.

    The row ends with the block, so that there is nothing later to see.
    """
    first = position // block * block
    row = np.concatenate([clean[:first], noisy[first : first + block]])
    valid = np.arange(LENGTH) < len(row)
    row = np.pad(row, (0, LENGTH - len(row)))[None]
    logits = np.asarray(APPLY[block]({'params': params}, row, valid[None]))[0, position]
    return logits[clean[position]] - np.log(np.exp(logits).sum())


APPLY = {block: jax.jit(Transformer(config).apply) for block, config in MODELS.items()}


@pytest.mark.parametrize('block', [1, 4])
def test_the_loss_is_that_of_a_loop_over_positions(params, block):
    """Two documents in a row, each of which alone gives the same; with blocks of 1 the context is
    that of an autoregressive model: all tokens before, and none after."""
    rng = np.random.default_rng(block)
    clean = rng.integers(0, 9, (2, 2 * LENGTH))
    maskable = np.tile(np.arange(LENGTH) >= 3, (2, 2))
    masks = drawn_masks(*keys(2, seed=1), jnp.asarray(maskable), complementary=False)
    masked = np.asarray(masks.masked)
    noisy = np.where(masked, MASK, clean)
    expected = 0.0
    for row in range(2):
        terms = []
        for position in np.flatnonzero(masked[row]):
            document = slice(position // LENGTH * LENGTH, position // LENGTH * LENGTH + LENGTH)
            place = position % LENGTH
            terms.append(log_prob(params, block, clean[row, document], noisy[row, document], place))
        expected -= np.mean(terms) / 2
    document = np.repeat([[0, 1]], LENGTH, axis=1).repeat(2, 0)
    valid = np.ones(clean.shape, bool)
    tokens, visible = streams(*map(jnp.asarray, (noisy, clean, valid, document)), block)
    logits = APPLY[0]({'params': params}, tokens, visible)[:, : 2 * LENGTH]
    assert_allclose(loss_of(logits, jnp.asarray(clean), masks), expected, atol=2e-5)


def test_noise_is_on_masked_tokens_only():
    masked = jnp.asarray([[True, False, True], [False, True, False]])  # one pair
    noise = np.asarray(noise_of(keys(1)[1], masked, 500, jnp.float32(0.3)))
    assert_array_equal(noise != 0, np.repeat(np.asarray(masked)[:, :, None], 500, axis=2))
    assert_allclose(noise[np.asarray(masked)].std(), 0.3, rtol=0.1)
    assert not noise_of(keys(1)[1], masked, 500, jnp.float32(0)).any()
