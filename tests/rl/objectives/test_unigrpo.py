"""UniGRPO: its paper's schedule, the authors' later code, and cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.objectives.unigrpo import mask_time
from tests.rl.objectives.published import (
    MASK,
    assert_published,
    draws_from,
    draws_over_updates,
    loss_of,
    objective_of,
    published,
    published_rollout,
)

pytestmark = pytest.mark.numerical
PROMPT = published()['prompt'].shape[1]


def by_sequence(values):
    """[R, ...] draws of the six sequences, neighbours of one sequence first, -> [6, R / 6, ...]."""
    return values.reshape(6, -1, *values.shape[1:])


@pytest.mark.parametrize('masking', ['random', 'coupled'])
def test_loss_and_gradient_of_the_later_code_are_the_published_ones(masking):
    arrays = published()
    case = 'unigrpo/dllm_rl_' + {'random': 'random_masking'}.get(masking, masking)
    epsilon, kl = float(arrays[f'{case}/epsilon']), float(arrays[f'{case}/beta_kl'])
    old, target = (by_sequence(arrays[f'{case}/{name}']) for name in ('old_logp', 'scored'))
    metrics = assert_published(
        case,
        objective_of('unigrpo', masking=masking, epsilon=epsilon, kl=kl),
        published_rollout(),
        draws_from(by_sequence(arrays[f'{case}/noisy'] == MASK), target=target),
        behaviour=old,
    )
    clipped, tokens = metrics['clip_share']
    assert_allclose(clipped / tokens, arrays[f'{case}/clip_fraction'], rtol=1e-6)


def test_two_sequences_of_the_later_code_by_hand():
    """Two draws of two tokens; the second draw of the second row scores nothing."""
    objective = objective_of('unigrpo', masking='random', masks=2, epsilon=0.2, kl=0.5)
    rollout = jax.tree.map(lambda x: x[:2], published_rollout(advantage=[2, -1, 0, 0, 0, 0]))
    rollout = rollout.replace(completion=np.full((2, 2), 5), scored=np.ones((2, 2), bool))
    target = np.array([[[True, True], [False, True]], [[True, False], [False, False]]])
    draws = Draws(masked=np.ones((2, 2, PROMPT + 2), bool), target=target)
    old = np.log(np.array([[[0.5, 0.5], [0.9, 0.5]], [[0.5, 0.9], [0.9, 0.9]]]))
    logp = np.log(np.array([[[0.8, 0.4], [0.1, 0.5]], [[0.25, 0.1], [0.1, 0.1]]]))
    loss, weight = loss_of(objective, logp, rollout, draws, behaviour=old)

    def k3(ratio):  # of the policy to the behaviour policy
        return 1 / ratio - 1 + np.log(ratio)

    # Ratios 1.6 and 0.8 in the first draw, 1 in the second; 0.5 in the other row.
    first = -(1.2 * 2 + 0.8 * 2) / 2 + 0.5 * (k3(1.6) + k3(0.8))
    expected = [first, -2.0, 0.8 + 0.5 * k3(0.5)]
    assert_allclose(loss, np.mean(expected), rtol=1e-5)
    assert weight == 3


def test_two_sequences_of_the_schedule_by_hand():
    """Tokens are averaged over the batch, those after the EOS too."""
    objective = objective_of('unigrpo', epsilon=0.2, kl=0.5)
    rollout = jax.tree.map(lambda x: x[:2], published_rollout(advantage=[1, -1, 0, 0, 0, 0]))
    rollout = rollout.replace(
        completion=np.array([[5, 6], [1, 1]]), scored=np.array([[True, True], [True, False]])
    )
    target = np.array([[[True, False]], [[True, True]]])
    draws = Draws(masked=np.ones((2, 1, PROMPT + 2), bool), target=target)
    others = {
        'behaviour': np.log(np.array([[[0.5, 0.1]], [[0.5, 0.5]]])),
        'reference': np.log(np.array([[[0.8, 0.9]], [[0.4, 0.5]]])),
    }
    logp = np.log(np.array([[[0.8, 0.8]], [[0.2, 0.5]]]))
    loss, weight = loss_of(objective, logp, rollout, draws, **others)
    # Ratios 1.6 (clipped to 1.2), 0.4 (to 0.8 for A = -1) and 1; k3 is 0 but for log 2 at one.
    assert_allclose(loss, (-1.2 + 0.8 + 1 + 0.5 * (2 - np.log(2) - 1)) / 3, rtol=1e-5)
    assert weight == 3


@pytest.mark.parametrize(('first', 'times', 'updates'), [(100, 1000, 5), (37, 128, 12)])
def test_times_are_those_of_the_paper(first, times, updates):
    expected = published()[f'unigrpo/formula/timesteps_t{first}_T{times}_mu{updates}']
    turns = np.arange(updates)
    assert_array_equal(mask_time(jnp.int32(first), turns, updates, times), expected)
    # With a single update there is one time, and it is the first.
    assert mask_time(jnp.int32(first), jnp.int32(0), 1, times) == first


def test_the_schedule_masks_one_share_of_all_rows_and_ends_with_everything():
    updates = 400
    draws = draws_over_updates(objective_of('unigrpo'), published_rollout(), updates, 2)
    masked = draws.masked[:, :, 0, PROMPT:]  # [updates, B, C]
    assert not draws.masked[..., :PROMPT].any()
    assert_array_equal(draws.target[:, :, 0], masked)
    first, last = masked[::2], masked[1::2]
    assert last.all()
    share = first.mean(axis=2)  # [200, B]
    assert_allclose(share.mean(), 0.5, atol=0.08)  # of t_1 / T ~ U(0, 1); four standard errors
    # Rows share the ratio, whose variance is 1/12, and not the positions.
    assert np.var(share.mean(axis=1)) > 0.06
    ratio = share.mean(axis=1, keepdims=True)
    assert np.abs(share - ratio).max() < 5 * 0.5 / np.sqrt(masked.shape[2])
    assert (first[:, 0] != first[:, 1]).any(axis=1).mean() > 0.9


@pytest.mark.parametrize('masking', ['random', 'coupled'])
def test_the_later_code_masks_a_share_a_draw_and_covers_each_token_with_its_complement(masking):
    rollout = published_rollout()
    objective = objective_of('unigrpo', masking=masking, masks=2)
    draws = draws_over_updates(objective, rollout, 200)
    masked, scored = draws.masked[..., PROMPT:], rollout.scored[None, :, None]
    assert not draws.masked[..., :PROMPT].any()
    assert np.where(scored, True, masked).all()  # after the EOS all is masked, and none scored
    assert_array_equal(draws.target, masked & scored)
    whole = masked[:, 0, :2]  # Row 0 has no EOS: [200, 2, C].
    share = whole.mean(axis=2)
    assert_allclose(share.mean(), 0.5, atol=0.06)
    assert np.all((share > 0.0) & (share < 1.0))
    # The variance of the share of 32 positions is Var(t) + E[t (1 - t)] / 32.
    assert_allclose(np.var(share), 0.8**2 / 12 + (0.25 - 0.8**2 / 12) / 32, rtol=0.2)
    assert masked.shape[2] == objective.draws == (4 if masking == 'coupled' else 2)
    if masking == 'coupled':
        covered = np.broadcast_to(2 * rollout.scored, (200, *rollout.scored.shape))
        assert_array_equal(draws.target.sum(axis=2), covered)


def test_tokens_of_all_groups_are_averaged():
    arrays, objective = published(), objective_of('unigrpo', group_size=3)
    case = 'unigrpo/dllm_rl_random_masking'
    masked = by_sequence(arrays[f'{case}/noisy'] == MASK)[:, :1]
    old, logp = (by_sequence(arrays[f'{case}/{name}'])[:, :1] for name in ('old_logp', 'logp'))
    draws = draws_from(masked, target=masked[..., PROMPT:])
    others = {'behaviour': old, 'reference': old}
    parts = [
        loss_of(objective, logp, published_rollout(), draws, rows, **others)
        for rows in (slice(3), slice(3, 6))
    ]
    loss, weight = loss_of(objective, logp, published_rollout(), draws, **others)
    assert_allclose(loss, sum(part * tokens for part, tokens in parts) / weight, rtol=1e-5)
    assert weight == masked.sum() == sum(tokens for _, tokens in parts)


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="unigrpo.masking is 'none'; use one of schedule, random"):
        objective_of('unigrpo', masking='none')
    with pytest.raises(ValueError, match='unigrpo.lowest 0.9 and unigrpo.highest 0.1'):
        objective_of('unigrpo', lowest=0.9, highest=0.1)
    with pytest.raises(ValueError, match='unigrpo.masks is 0; use 1 or more'):
        objective_of('unigrpo', masks=0)
