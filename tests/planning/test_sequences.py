"""Sequences through the network: the formula against a count by a loop, update by update."""

import pytest

from configs import countdown
from spg_jax.assembly import assemble
from spg_jax.method import set_objective
from spg_jax.planning.sequences import amounts, counts, updates_within

pytestmark = pytest.mark.fast
# The small preset, typed a second time: rows of a rollout, denoising steps, draws, inner updates.
ROWS, STEPS, DRAWS, INNER = 128, 12, 4, 2


def parts_of(objective, **settings):
    config = countdown.get_config('small')
    with config.unlocked():
        set_objective(config, objective)
    config.update_from_flattened_dict({key.replace('__', '.'): x for key, x in settings.items()})
    return assemble(config)


def counted(updates, at_update, at_rollout=0, draws=1, collected=lambda step: step % INNER == 0):
    """(forwards, backwards) of a method by a loop.

    Args:
      updates: how many.
      at_update: policies that are read out under each draw of an update.
      at_rollout: draws of a row that are read out when a rollout arrives.
      draws: of each row at an update.
      collected: update -> rollouts before it.
    """
    forward = backward = 0
    for step in range(updates):
        for _ in range(int(collected(step))):
            forward += ROWS * STEPS
            forward += ROWS * at_rollout
        for _ in range(draws):
            forward += ROWS * at_update
            backward += ROWS
    return [forward, backward]


@pytest.mark.parametrize(
    ('objective', 'settings', 'expected'),
    [
        ('spg', {}, lambda n: counted(n, 1, draws=DRAWS)),
        ('spg', {'spg__negative': 'none'}, lambda n: counted(n, 1, draws=DRAWS)),
        # The policy and the reference at each update, the policy that sampled at the rollout.
        ('d1', {}, lambda n: counted(n, 2, at_rollout=INNER)),
        ('d1', {'d1__kl': 0.0}, lambda n: counted(n, 1, at_rollout=INNER)),
        ('wd1', {}, lambda n: counted(n, 1)),
        # The policy and its teacher; four rollouts at the beginning of a phase, one every second.
        (
            'dtm',
            {'dtm__phase': 6, 'dtm__every': 2},
            lambda n: counted(n, 2, collected=lambda t: 4 if t % 6 == 0 else (t % 6) % 2 == 0),
        ),
        # All that is sampled is sampled before the first update.
        (
            'spg_jax.rl.rejection',
            {'rejection__batches': 5},
            lambda n: counted(n, 1, collected=lambda t: 5 if t == 0 else 0),
        ),
    ],
)
def test_the_formula_counts_as_a_loop_does(objective, settings, expected):
    parts = parts_of(objective, **settings)
    table = counts(parts, 13)
    assert table[0].tolist() == [0, 0]
    for updates in (1, 2, 7, 13):
        assert table[updates].tolist() == expected(updates)
    assert amounts(parts, 13, 'sequences')[13] == sum(expected(13))
    assert amounts(parts, 13, 'updates')[13] == 13


def test_guidance_reads_two_prompts_at_each_step():
    with_guidance = counts(parts_of('spg', sampling__guidance=1.0), 1)[1]
    assert (with_guidance - counts(parts_of('spg'), 1)[1]).tolist() == [ROWS * STEPS, 0]


@pytest.mark.parametrize('unit', ['sequences', 'forward', 'backward', 'updates'])
@pytest.mark.parametrize('objective', ['spg', 'd1', 'dtm'])
def test_no_more_updates_than_the_budget_pays_for(objective, unit):
    parts, amount = parts_of(objective), 97_531
    if unit == 'updates':
        amount = 97
    updates = updates_within(parts, amount, unit)
    taken = amounts(parts, updates + 1, unit)
    assert taken[updates] <= amount < taken[updates + 1]


def test_a_budget_below_one_update_pays_for_one():
    assert updates_within(parts_of('spg'), 1, 'sequences') == 1


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="budget is 'updats', perhaps updates; use one of seq"):
        amounts(parts_of('spg'), 1, 'updats')
