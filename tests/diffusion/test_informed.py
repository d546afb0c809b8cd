"""Informed masking: influence, as the sampler measures it, and masks that follow it."""

import dataclasses
from functools import partial
from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.diffusion.corruption import Corruption, _random_subset
from spg_jax.diffusion.informed import change_around, gumbel, masking_preference
from spg_jax.diffusion.sampling import SamplingConfig
from tests.diffusion.test_sampling import ALLOWED, MASK, Toy, logits_in_numpy, prompts

pytestmark = pytest.mark.numerical

REFERENCE = Path(__file__).parents[1] / 'reference'
LENGTH, BLOCK = 12, 4
PROMPT_MASK = np.ones(3, bool)


# ---- The formulas, against an independent implementation of them


@pytest.mark.parametrize('case', ['w10_d1.5', 'w3_d1.5', 'w10_d0.0'])
def test_influence_probabilities_and_masks_are_the_stored_ones(case):
    window, strength = int(case[1:].split('_')[0]), float(case.split('_d')[1])
    with np.load(REFERENCE / 'objectives.npz') as file:
        golden = {
            name.split('/', 2)[2]: file[name] for name in file.files if name.startswith('informed')
        }
    confidence, commit_step = golden['confidence'], golden['commit_step']
    influence = np.zeros(16, np.float32)
    for step in range(7):  # the last step, 7, has no forward pass after it
        change = change_around(
            confidence[step : step + 1],
            confidence[step + 1 : step + 2],
            (commit_step > step)[None],
            window,
        )
        influence = np.where(commit_step == step, change[0], influence)
    assert_allclose(influence, golden[f'{case}/influence'], rtol=1e-5, atol=1e-6)
    region = np.ones(16, bool)
    preference = masking_preference(jnp.asarray(influence), region, strength)
    assert_allclose(jax.nn.softmax(preference), golden[f'{case}/probability'], rtol=1e-5)
    # Uniform noise that becomes the stored Gumbel noise; 6 of 16 positions: .35 x 16 is 5.6.
    noise = np.exp(-np.exp(-golden['gumbel'].astype(float))).astype(np.float32)
    assert_allclose(gumbel(jnp.asarray(noise)), golden['gumbel'], rtol=1e-3, atol=1e-5)
    masked = _random_subset(jnp.asarray([0.35, *noise]), region, preference)
    assert_array_equal(masked, golden[f'{case}/masked_6'])


def test_influence_by_hand():
    """The first two of five tokens were committed together; the last is too far from the first."""
    before = jnp.array([[0.9, 0.8, 0.5, 0.4, 0.3]])
    after = jnp.array([[0.1, 0.1, 0.7, 0.1, 0.2]])
    change = change_around(before, after, jnp.array([[False, False, True, True, True]]), 3)
    assert_allclose(change[0, :2], [0.2 + 0.3, 0.2 + 0.3 + 0.1], rtol=1e-5)


# ---- The sampler measures influence, here against a loop over a finished rollout


def confidences(toy, prompt, tokens, commit_step, steps):
    """Top-1 probabilities [steps, C] of the state before each step, in float64."""
    choices = ALLOWED.copy()
    choices[MASK] = False
    rows = []
    for step in range(steps):
        seen = (commit_step >= 0) & (commit_step < step)
        logits = logits_in_numpy(toy, [*prompt, *np.where(seen, tokens, MASK)])[len(prompt) :]
        prob = np.exp(logits - logits.max(-1, keepdims=True))
        rows.append((prob / prob.sum(-1, keepdims=True))[:, choices].max(-1))
    return np.array(rows)


def influence_of(confidence, commit_step, last, window):
    """The definition, pair by pair. A position that was never committed is masked until the end."""
    influence = np.zeros(len(commit_step))
    until = np.where(commit_step < 0, len(confidence), commit_step)
    for i, step in enumerate(commit_step):
        if not 0 <= step < last:
            continue
        for j in range(max(i - window, 0), min(i + window + 1, len(commit_step))):
            if until[j] > step:
                influence[i] += abs(confidence[step + 1, j] - confidence[step, j])
    return influence


def test_the_sampler_measures_influence_beyond_the_block():
    toy, steps, window = Toy(eos_bias=3.0), 8, 3
    plain = SamplingConfig(length=16, steps=steps, block_length=4, temperature=1.0)
    recording = dataclasses.replace(
        plain, records=('influence', 'log_prob'), influence_window=window
    )
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    expected = toy.generate(tokens, mask, keys, plain)
    completion = toy.generate(tokens, mask, keys, recording)
    assert_array_equal(completion.tokens, expected.tokens)
    assert_array_equal(completion.commit_step, expected.commit_step)
    crosses = 0
    for row in range(len(tokens)):
        prompt, commit_step = tokens[row][mask[row]].tolist(), completion.commit_step[row]
        commit_step, drawn = np.asarray(commit_step), np.asarray(completion.tokens[row])
        confidence = confidences(toy, prompt, drawn, commit_step, steps)
        last = commit_step.max()  # the step that ended the row
        influence = influence_of(confidence, commit_step, last, window)
        assert_allclose(completion.extras['influence'][row], influence, atol=2e-5)
        ends = (commit_step == last) | (commit_step < 0)
        assert not np.asarray(completion.extras['influence'][row])[ends].any()
        assert not np.asarray(completion.extras['log_prob'][row])[commit_step < 0].any()
        # The last step of a block influences the blocks after it alone.
        crosses += influence[(commit_step % 2 == 1) & (commit_step < last)].max(initial=0) > 0.01
    assert crosses > 1
    assert (np.asarray(completion.commit_step) < 0).any()


# ---- Corruptions that prefer positions of little influence

SCORED = np.arange(LENGTH) < 10  # three blocks reached, two scored positions in the last
# Blocks of four positions: equal influence, one position that decides, and influence growing.
INFLUENCE = jnp.asarray([2.0, 2, 2, 2, 0, 0, 9, 0, 0, 1, 5, 5])


@partial(jax.jit, static_argnums=0)
def corrupted(corruption, keys):
    draw = jax.vmap(corruption, (0, None, None, None))
    return draw(keys, PROMPT_MASK, SCORED, INFLUENCE)


def draws_of(kind, keys=12_000, **options):
    """masked [keys, C] of one draw each, and block [keys]."""
    corruption = Corruption(kind, 1, BLOCK, prompt_rate=0.0, **options)
    draws = corrupted(corruption, jax.random.split(jax.random.key(5), keys))
    return np.asarray(draws.masked)[:, 0, len(PROMPT_MASK) :], np.asarray(draws.block)[:, 0]


@pytest.mark.parametrize('kind', ['block', 'uniform'])
def test_as_many_positions_are_masked_in_the_same_regions(kind):
    plain, blocks = draws_of(kind)
    informed, informed_blocks = draws_of(kind, informed=True)
    assert_array_equal(blocks, informed_blocks)
    assert_array_equal(plain.sum(1), informed.sum(1))
    assert informed[:, ~SCORED].all()
    if kind == 'block':
        position_block = np.arange(LENGTH) // BLOCK
        outside = position_block[None, :] != blocks[:, None]
        assert_array_equal(plain[outside], informed[outside])
    # Of the second block, the deciding position is masked last.
    chosen = (blocks == 1) & (informed[:, 4:8].sum(1) < 4) if kind == 'block' else slice(None)
    assert informed[chosen, 6].mean() < 0.6 * plain[chosen, 6].mean()


def test_subsets_are_drawn_without_replacement_from_the_softmax():
    """Block 1, influences 0, 0, 9, 0 at d = 1.5: pairs by the law of successive draws."""
    masked, blocks = draws_of('block', informed=True)
    masked = masked[blocks == 1, 4:8]
    pairs = masked[masked.sum(1) == 2]
    weight = np.exp([1.5, 1.5, 0.0, 1.5])  # (max - m) / (max - min) is 1 or 0
    law = weight / weight.sum()
    names = list(combinations(range(4), 2))
    probability = np.array(
        [law[i] * law[j] / (1 - law[i]) + law[j] * law[i] / (1 - law[j]) for i, j in names]
    )
    counts = np.array([(pairs[:, i] & pairs[:, j]).sum() for i, j in names])
    assert_chi_square(counts, probability)


def test_strength_zero_and_equal_influence_are_uniform():
    for options, block in (({'strength': 0.0}, 1), ({'strength': 1.5}, 0)):
        masked, blocks = draws_of('block', informed=True, **options)
        masked = masked[blocks == block, BLOCK * block : BLOCK * (block + 1)]
        for size in (1, 2):
            subsets = masked[masked.sum(1) == size]
            names = list(combinations(range(4), size))
            counts = np.array([subsets[:, list(name)].all(1).sum() for name in names])
            assert_chi_square(counts, np.full(len(names), 1 / len(names)))


def assert_chi_square(counts, probability):
    expected = counts.sum() * probability
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    assert counts.sum() > 500 and statistic < freedom + 5 * np.sqrt(2 * freedom), counts


def test_kinds_that_choose_nothing_and_strengths_below_zero_are_refused():
    for kind in ('full', 'block_full'):
        with pytest.raises(ValueError, match=f"corruption.kind '{kind}', .* use uniform or block"):
            Corruption(kind, 1, BLOCK, informed=True)
    with pytest.raises(ValueError, match='corruption.strength is -1'):
        Corruption('block', 1, BLOCK, informed=True, strength=-1)
