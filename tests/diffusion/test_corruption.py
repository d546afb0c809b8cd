"""Corruptions, region by region, over ten thousand draws, against rates worked out by hand."""

from functools import cache, partial
from itertools import pairwise, permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg_jax.diffusion.corruption import (
    KINDS,
    Corruption,
    apply_masks,
    scored_positions,
)

PROMPT_MASK = np.arange(10) >= 3  # three positions of padding and seven real ones
LENGTH, BLOCK = 32, 8
SCORED = np.arange(LENGTH) < 21  # three blocks reached, five scored positions in the last
REAL = PROMPT_MASK.sum()
POSITION_BLOCK = np.arange(LENGTH) // BLOCK
KEYS = 5_000  # each has two draws


# All corruptions that are sampled are drawn by one program.
CORRUPTIONS = {
    **{kind: Corruption(kind, 2, BLOCK) for kind in KINDS},
    'uniform without a rate': Corruption('uniform', 2, BLOCK, prompt_rate=0.0),
    'block without a rate': Corruption('block', 2, BLOCK, prompt_rate=0.0),
    'block, clean completion': Corruption('block', 2, BLOCK, perturb_completion=False),
    'stratified': Corruption('uniform', 4, BLOCK, times='stratified'),
    'seven draws': Corruption('block', 7, BLOCK),
    'released': Corruption('block', 2, BLOCK, block_draw='released'),
}


@partial(jax.jit, static_argnums=0)
def corrupted(names, keys, scored, prompt_mask=PROMPT_MASK):
    def draw(key, scored):
        return {
            name: CORRUPTIONS[name](key, prompt_mask, scored & FIRST.get(name, True))
            for name in names
        }

    return jax.vmap(draw)(keys, scored)


# A completion whose numbers of masked positions fall into four equal parts.
FIRST = {'stratified': np.arange(LENGTH) < 20}


@cache
def samples():
    """Draws by name of `CORRUPTIONS` and number of scored positions."""
    counts = {21: KEYS, 0: 200, 1: 200}
    ends = np.cumsum([0, *counts.values()])
    keys = jax.random.split(jax.random.key(0), KEYS)[np.arange(ends[-1]) % KEYS]
    scored = np.arange(LENGTH) < np.repeat([*counts], [*counts.values()])[:, None]
    drawn = jax.device_get(corrupted(tuple(CORRUPTIONS), keys, scored))
    return {
        count: jax.tree.map(lambda x, a=a, b=b: x[a:b], drawn)
        for count, (a, b) in zip(counts, pairwise(ends), strict=True)
    }


def sample(name, length=21):
    """Masks of the prompt [keys, draws, P] and completion [keys, draws, C]; block [keys, draws]."""
    drawn = samples()[length][name]
    return drawn.masked[:, :, :10], drawn.masked[:, :, 10:], drawn.block


def assert_counts(counts, probabilities):
    """Asserts that Pearson's chi-square is within five standard deviations of its mean."""
    counts = np.asarray(counts, float)
    expected = counts.sum() * np.asarray(probabilities, float)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (counts, expected)


def assert_rate(hits, probability):
    hits = np.asarray(hits)
    error = np.sqrt(probability * (1 - probability) / hits.size)
    assert abs(hits.mean() - probability) < 5 * error, (hits.mean(), probability)


@pytest.fixture(scope='module')
def block_draws():
    return sample('block')


@pytest.mark.parametrize('kind', KINDS)
def test_real_prompt_tokens_are_perturbed_and_padding_never(kind):
    prompt, _, _ = sample(kind)
    assert not prompt[:, :, :3].any()
    for position in range(3, 10):
        assert_rate(prompt[:, :, position], 0.15)
    # Two draws, and two positions, are perturbed independently of each other.
    assert_rate(prompt[:, 0, 3:] & prompt[:, 1, 3:], 0.15**2)
    assert_rate(prompt[:, :, 3] & prompt[:, :, 4], 0.15**2)


@cache
def without_padding():
    keys = jax.random.split(jax.random.key(0), KEYS)
    return jax.device_get(corrupted(KINDS, keys, np.tile(SCORED, (KEYS, 1)), np.ones(7, bool)))


@pytest.mark.parametrize('kind', KINDS)
def test_padding_on_the_left_of_the_prompt_moves_no_mask(kind):
    prompt, completion, _ = sample(kind)  # with three positions of padding
    alone = without_padding()[kind].masked
    assert alone.any()
    np.testing.assert_array_equal(alone[:, :, :7], prompt[:, :, 3:])
    np.testing.assert_array_equal(alone[:, :, 7:], completion)


@pytest.mark.parametrize('kind', KINDS)
def test_positions_after_the_first_eos_are_always_masked(kind):
    _, completion, _ = sample(kind)
    assert completion[:, :, ~SCORED].all()


@pytest.mark.parametrize('kind', ['uniform', 'block'])
def test_prompt_rate_zero_perturbs_nothing(kind):
    prompt, completion, block = sample(f'{kind} without a rate')
    assert not prompt.any()
    assert not completion[:, :, SCORED][
        np.broadcast_to(POSITION_BLOCK[SCORED], (KEYS, 2, 21)) < block[:, :, None]
    ].any()


def test_perturbation_of_completions_can_be_off_while_prompts_keep_theirs():
    prompt, completion, block = sample('block, clean completion')
    assert_rate(prompt[:, :, 3:], 0.15)
    assert not completion[POSITION_BLOCK < block[:, :, None]].any()


def test_full_masks_every_completion_token():
    _, completion, block = sample('full')
    assert completion.all() and not block.any()


def test_uniform_masks_every_number_of_positions_equally_often():
    _, completion, block = sample('uniform')
    assert not block.any()
    sizes = completion[:, :, SCORED].sum(-1)
    assert_counts(np.bincount(sizes.ravel(), minlength=22)[1:], np.full(21, 1 / 21))
    assert sizes.min() == 1
    # Every position is masked equally often; the mean of k/n over k = 1..n is (n+1)/2n.
    for position in range(21):
        assert_rate(completion[:, :, position], 22 / 42)
    first, second = sizes[:, 0], sizes[:, 1]
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(KEYS)


def test_stratified_times_cover_every_quarter_of_the_numbers():
    """With four draws over 20 positions; the number of each draw alone is uniform."""
    _, completion, _ = sample('stratified')
    sizes = completion[:, :, :20].sum(-1)
    assert (np.sort((sizes - 1) // 5, axis=1) == np.arange(4)).all()
    for draw in range(4):
        assert_counts(np.bincount(sizes[:, draw], minlength=21)[1:], np.full(20, 1 / 20))


@pytest.mark.parametrize('kind', ['block', 'block_full'])
def test_chosen_blocks_are_uniform_over_those_reached(kind):
    _, _, block = sample(kind)
    for draw in range(2):
        assert_counts(np.bincount(block[:, draw], minlength=4)[:3], np.full(3, 1 / 3))
    assert block.max() == 2
    assert (block[:, 0] != block[:, 1]).all()  # without replacement


def test_block_masks_every_number_of_its_scored_positions_equally_often(block_draws):
    _, completion, block = block_draws
    for chosen, scored in ((0, 8), (1, 8), (2, 5)):
        inside = completion[block == chosen][:, chosen * BLOCK : chosen * BLOCK + scored]
        sizes = inside.sum(-1)
        assert sizes.min() == 1
        assert_counts(np.bincount(sizes, minlength=scored + 1)[1:], np.full(scored, 1 / scored))
        # This rate would be higher if unmasked tokens of the block were perturbed too.
        for position in range(scored):
            assert_rate(inside[:, position], (scored + 1) / (2 * scored))


def test_block_perturbs_earlier_blocks_and_masks_later_ones(block_draws):
    _, completion, block = block_draws
    for chosen in range(3):
        rows = completion[block == chosen]
        assert rows[:, POSITION_BLOCK > chosen].all()
        for position in range(chosen * BLOCK):
            assert_rate(rows[:, position], 0.15)
    both = (block > 0).all(-1)
    assert_rate(completion[both, 0, :BLOCK] & completion[both, 1, :BLOCK], 0.15**2)


def test_block_full_masks_the_chosen_block_and_all_later_ones():
    _, completion, block = sample('block_full')
    assert completion[POSITION_BLOCK >= block[:, :, None]].all()
    for chosen in (1, 2):
        assert_rate(completion[block == chosen][:, : chosen * BLOCK], 0.15)


def test_balanced_draws_cycle_through_one_permutation_when_they_exceed_the_blocks():
    _, _, block = sample('seven draws')
    assert (block[:, 3:6] == block[:, :3]).all() and (block[:, 6] == block[:, 0]).all()
    codes = block[:, :3] @ np.array([9, 3, 1])
    orders = [9 * a + 3 * b + c for a, b, c in permutations(range(3))]
    assert set(codes) == set(orders)
    assert_counts([(codes == order).sum() for order in orders], np.full(6, 1 / 6))


def test_released_block_draw_is_a_permutation_of_all_blocks_modulo_those_reached():
    """With three of four blocks reached, 0 is chosen half of the time, and twice in 2 of 12."""
    _, _, block = sample('released')
    expected = np.zeros(9)
    for order in permutations(range(4)):
        expected[3 * (order[0] % 3) + order[1] % 3] += 1 / 24
    possible = expected > 0
    counts = np.bincount(3 * block[:, 0] + block[:, 1], minlength=9)
    assert not counts[~possible].any()
    assert_counts(counts[possible], expected[possible])
    assert_rate(block == 0, 0.5)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('length', [0, 1])
def test_completions_of_one_token_or_none_are_masked_by_every_draw(kind, length):
    _, completion, block = sample(kind, length)
    assert completion.all() and not block.any()


def test_draws_depend_on_the_key_and_not_on_the_batch_or_the_number_of_draws():
    prompt, completion, block = sample('seven draws')
    key = jax.random.split(jax.random.key(0), KEYS)[4]
    alone = jax.jit(CORRUPTIONS['seven draws'])(key, PROMPT_MASK, SCORED)
    np.testing.assert_array_equal(alone.masked[:, :10], prompt[4])
    np.testing.assert_array_equal(alone.masked[:, 10:], completion[4])
    np.testing.assert_array_equal(alone.block, block[4])
    for many, few in zip((prompt, completion, block), sample('block'), strict=True):
        np.testing.assert_array_equal(many[:, :2], few)
    masked = np.concatenate([prompt, completion], axis=2)[:6, :3]
    assert len(np.unique(masked.reshape(18, -1), axis=0)) == 18


@pytest.mark.parametrize(
    ('completion', 'length'),
    [([5, 6, 1, 7, 1], 3), ([1, 5, 6, 7, 8], 1), ([5, 6, 7, 8, 9], 5), ([5, 6, 7, 8, 1], 5)],
)
def test_scored_positions_run_through_the_first_eos(completion, length):
    scored = scored_positions(jnp.array(completion), 1)
    np.testing.assert_array_equal(scored, np.arange(5) < length)


def test_apply_masks_replaces_masked_tokens_in_every_draw():
    masked = jnp.array([[True, False, False], [False, True, True]])
    noisy = apply_masks(jnp.array([4, 5, 6]), masked, 9)
    np.testing.assert_array_equal(noisy, [[9, 5, 6], [4, 9, 9]])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'kind': 'blocks'}, "kind is 'blocks', perhaps block; use one of full, uniform, block,"),
        ({'draws': 0}, 'draws is 0; .*at least 1'),
        ({'block_length': 0}, 'block_length is 0; .*at least 1'),
        ({'prompt_rate': 1.5}, 'prompt_rate is 1.5; .*within'),
        ({'kind': 'full', 'times': 'stratified'}, "kind 'full', which masks no random number"),
        ({'block_draw': 'random'}, "block_draw is 'random'; use one of balanced, released"),
    ],
)
def test_impossible_corruptions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Corruption(**{'kind': 'block', 'draws': 2, 'block_length': 8, **options})
