"""TraceRL against its released code, cases by hand, its states and the prompts that it drops."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.diffusion.corruption import Draws
from tests.rl.objectives.published import (
    MASK,
    advantage_of,
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
ALL_KEPT = np.ones(6, bool)


def by_sequence(values):
    """[R, ...] states of the six sequences, by neighbours -> [6, R / 6, ...]."""
    return values.reshape(6, -1, *values.shape[1:])


def published_states(shrink):
    """The published draws, and the log-probabilities of policy and behaviour, [6, M, C]."""
    arrays, case = published(), f'tracerl/tracerl_shrink{shrink}'
    noisy, scored, logp, old = (
        by_sequence(arrays[f'{case}/{name}']) for name in ('noisy', 'scored', 'logp', 'old_logp')
    )
    return draws_from(noisy == MASK, target=scored), logp, old


@pytest.mark.parametrize('shrink', [4, 1])
def test_loss_gradient_and_states_are_the_published_ones(shrink):
    arrays, case = published(), f'tracerl/tracerl_shrink{shrink}'
    epsilon, kl = float(arrays[f'{case}/epsilon']), float(arrays[f'{case}/beta_kl'])
    objective = objective_of('tracerl', shrink=shrink, epsilon=epsilon, kl=kl)
    rollout = published_rollout(kept=ALL_KEPT)
    draws, _, old = published_states(shrink)
    metrics = assert_published(case, objective, rollout, draws, behaviour=old)
    clipped, tokens = metrics['clip_share']
    assert_allclose(clipped / tokens, arrays[f'{case}/clip_fraction'], rtol=1e-6)
    # The released run scores tokens after the EOS, which it did not know.
    without_eos = rollout.replace(scored=np.ones_like(rollout.scored))
    ours = jax.tree.map(lambda x: x[0], draws_over_updates(objective, without_eos, 1))
    assert objective.draws == draws.masked.shape[1]
    assert_array_equal(ours.masked, draws.masked)
    assert_array_equal(ours.target, draws.target)


def test_states_score_each_token_once_through_the_eos():
    """A row that stops after its first block: what was not drawn is masked and never scored."""
    objective, rollout = objective_of('tracerl', shrink=3), published_rollout(kept=ALL_KEPT)
    commit_step = rollout.commit_step.copy()
    commit_step[2, 8:] = -1  # Row 2 has its EOS at position 4.
    draws = draws_over_updates(objective, rollout.replace(commit_step=commit_step), 1)
    assert objective.draws == 6  # 16 steps
    assert_array_equal(draws.target[0].sum(axis=1), rollout.scored)
    assert draws.masked[0, 2, :, PROMPT + 8 :].all()
    assert not draws.masked[..., :PROMPT].any()
    assert not draws.target[0, 2, 2:].any()


def test_two_states_by_hand_and_a_prompt_that_is_dropped():
    objective = objective_of('tracerl', group_size=2, epsilon=0.2, kl=0.5)
    rollout = jax.tree.map(
        lambda x: x[:3], published_rollout(advantage=[2, -1, 5, 0, 0, 0], kept=ALL_KEPT)
    )
    rollout = rollout.replace(
        completion=np.full((3, 2), 5),
        scored=np.ones((3, 2), bool),
        extras={'kept': np.array([True, True, False])},
    )
    # The second row has one state with a token, and one without; the third row is dropped.
    target = np.array(
        [[[True, True], [False, False]], [[True, False], [False, False]], [[True, False]] * 2]
    )
    draws = Draws(masked=np.ones((3, 2, PROMPT + 2), bool), target=target)
    old = np.log(np.array([[[0.5, 0.5], [0.9, 0.5]], [[0.5, 0.9]] * 2, [[0.3, 0.9]] * 2]))
    logp = np.log(np.array([[[0.8, 0.4], [0.1, 0.5]], [[0.25, 0.1]] * 2, [[0.9, 0.1]] * 2]))
    loss, weight = loss_of(objective, logp, rollout, draws, behaviour=old)

    def k3(ratio):  # of the policy to the behaviour policy
        return 1 / ratio - 1 + np.log(ratio)

    first = -(1.2 * 2 + 0.8 * 2) / 2 + 0.5 * (k3(1.6) + k3(0.8))
    assert_allclose(loss, (first + 0.8 + 0.5 * k3(0.5)) / 2, rtol=1e-5)
    assert weight == 2


def test_prompts_are_kept_by_their_accuracy_and_advantages_are_z_scores():
    reward = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1], np.float32)
    rollout = published_rollout().replace(reward=reward)
    objective = objective_of('tracerl', group_size=5, rows=20)
    kept = objective.at_rollout(None, rollout, None)['kept']
    # Accuracies 0.2, 0, 0.8 and 1.
    assert_array_equal(kept, np.repeat([True, False, True, False], 5))
    advantage = np.asarray(advantage_of(objective, reward, 5)).reshape(4, 5)
    for row, rewards in zip(advantage, np.asarray(reward).reshape(4, 5), strict=True):
        deviation = np.std(rewards)
        expected = (rewards - rewards.mean()) / deviation if deviation else 0 * rewards
        assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    arrays = published()
    rewards = arrays['advantage/formula/rewards']
    found = advantage_of(objective, np.asarray(rewards.reshape(-1)), 6)
    expected = arrays['advantage/formula/std_population'].reshape(-1)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_mean_is_over_the_states_of_all_groups():
    objective, rollout = objective_of('tracerl', group_size=3), published_rollout(kept=ALL_KEPT)
    draws, logp, old = published_states(4)
    parts = [
        loss_of(objective, logp, rollout, draws, rows, behaviour=old)[0]
        for rows in (slice(3), slice(3, 6))
    ]
    loss, weight = loss_of(objective, logp, rollout, draws, behaviour=old)
    assert_allclose(loss, np.mean(parts), rtol=1e-5)
    assert weight == 24
    # With the second group dropped, the loss is that of the first.
    dropped = rollout.replace(extras={'kept': np.arange(6) < 3})
    loss, weight = loss_of(objective, logp, dropped, draws, behaviour=old)
    assert_allclose(loss, parts[0], rtol=1e-5)
    assert weight == 12


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match='tracerl.shrink is 0; use 1 or more'):
        objective_of('tracerl', shrink=0)
    with pytest.raises(ValueError, match='tracerl.lowest 0.9 exceeds tracerl.highest 0.8'):
        objective_of('tracerl', lowest=0.9)
