"""The rules of the guard on made-up series: which signs are told, which checkpoints are sound."""

import json
import statistics
from pathlib import Path

import pytest

from spg_jax.runs.guard import Guard, Rules
from spg_jax.runs.guard import result as outcome
from spg_jax.runs.report import closing_lines

pytestmark = pytest.mark.fast

RULES = Rules(rollbacks=2, window=4, reward_fall=0.5, accuracy_fall=0.5, skipped=3)
HEALTHY = {
    'reward': 0.4,
    'groups_with_signal': 0.5,
    'gradient_norm': 1.0,
    'commonest_token': 0.2,
    'repeats': 0.1,
    'eos_rate': 1.0,
    'skipped_in_a_row': 0.0,
}


def guard(**changes):
    return Guard(Rules(**vars(RULES) | changes), problems=256)


def feed(guard, updates, start=1, **changes):
    """Reads rows of so many updates, and returns the figures of the last."""
    for step in range(start, start + updates):
        figures = guard.read(HEALTHY | {'step': step} | changes)
    return figures


def test_a_healthy_run_has_no_sign(capsys):
    healthy = guard()
    feed(healthy, 30)
    healthy.read_validation(30, 0.3)
    assert not healthy.signs and not healthy.collapse and not capsys.readouterr().out


@pytest.mark.parametrize(
    ('changes', 'sign'),
    [
        ({'reward': 0.29}, 'reward'),  # a quarter below 0.4 is 0.3
        ({'commonest_token': 0.61}, 'commonest_token'),  # half of the way from 0.2 to 1 is 0.6
        ({'repeats': 0.56}, 'repeats'),
        ({'eos_rate': 0.49}, 'eos_rate'),
        ({'groups_with_signal': 0.0}, 'no_signal'),
        ({'skipped_in_a_row': 1.0}, 'skipped'),
    ],
)
def test_each_sign_is_told_once_in_a_sentence_that_names_it(capsys, changes, sign):
    run = guard()
    feed(run, 4)
    feed(run, 8, start=5, **changes)
    assert list(run.signs) == [sign] and not run.collapse
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith('warning: after update ') and line.endswith(f'(sign {sign})')
    assert run.memory['told'] == {sign: 1}


@pytest.mark.parametrize(
    'changes', [{'reward': 0.31}, {'commonest_token': 0.59}, {'repeats': 0.54}, {'eos_rate': 0.51}]
)
def test_less_than_that_is_no_sign(changes):
    run = guard()
    feed(run, 4)
    feed(run, 8, start=5, **changes)
    assert not run.signs


def test_entropy_is_compared_with_its_first_value():
    run = guard()
    for step, entropy in ((1, 2.0), (2, 0.21)):
        run.read(HEALTHY | {'step': step, 'entropy': entropy})
    assert not run.signs
    run.read(HEALTHY | {'step': 3, 'entropy': 0.19})
    assert list(run.signs) == ['entropy']


def test_a_policy_that_moves_ten_times_as_far_as_before_is_told_and_sound():
    run = guard()
    for step, moved in ((1, 0.2), (2, 0.01), (3, 0.09)):
        run.read(HEALTHY | {'step': step, 'kl_step': moved})
    assert not run.signs
    run.read(HEALTHY | {'step': 4, 'kl_step': 0.11})
    assert list(run.signs) == ['kl_step']
    run.mark(4)
    assert run.needed == [4]


def test_signs_count_only_over_a_whole_window():
    run = guard()
    feed(run, 4)
    feed(run, 3, start=5, eos_rate=0.34)  # the mean of the window is still 0.505
    assert not run.signs
    feed(run, 1, start=8, eos_rate=0.34)
    assert list(run.signs) == ['eos_rate']


def test_the_reward_collapses_below_half_of_its_best():
    run = guard()
    feed(run, 4)
    feed(run, 4, start=5, reward=0.8)
    feed(run, 4, start=9, reward=0.41)
    assert not run.collapse
    feed(run, 4, start=13, reward=0.39)
    assert run.collapse == 'reward is 0.39, after 0.8 at best'


@pytest.mark.parametrize(
    ('accuracies', 'collapses'),
    [
        ((0.5, 0.24), True),
        ((0.5, 0.26), False),
        # Half of a small accuracy is lost by chance: 3 sqrt(0.02 x 0.98 / 256) = 0.026.
        ((0.02, 0.0), False),
    ],
)
def test_the_accuracy_collapses_below_half_of_its_best_beyond_chance(accuracies, collapses):
    run = guard()
    for step, accuracy in enumerate(accuracies):
        run.read_validation(step, accuracy)
    assert bool(run.collapse) == collapses


def test_updates_that_are_not_finite_collapse_in_a_row():
    run = guard()
    feed(run, 1, skipped_in_a_row=2.0, reward=None, gradient_norm=None)
    assert not run.collapse
    feed(run, 1, start=2, skipped_in_a_row=3.0, reward=None, gradient_norm=None)
    assert run.collapse == '3 updates in a row were not finite'


def test_the_variation_of_the_gradient_norm_is_that_of_the_window():
    run, norms = guard(), [9.0, 1.0, 2.0, 3.0, 4.0]
    for step, norm in enumerate(norms):
        figures = run.read(HEALTHY | {'step': step, 'gradient_norm': norm})
    expected = statistics.stdev(norms[1:]) / statistics.fmean(norms[1:])
    assert figures == {'gradient_norm_variation': pytest.approx(expected)}


def test_a_checkpoint_is_sound_a_window_later():
    run = guard()
    feed(run, 3)
    run.mark(3)
    assert run.sound is None and run.needed == [3]
    feed(run, 3, start=4)
    run.mark(6)
    assert run.sound is None and run.needed == [3]
    feed(run, 3, start=7)
    run.mark(9)
    assert run.sound == 3 and run.needed == [3, 9]


def test_a_checkpoint_before_a_sign_or_at_one_is_not_sound():
    run = guard()
    feed(run, 4)
    run.mark(4)
    feed(run, 4, start=5)
    run.mark(8)
    assert run.sound == 4
    feed(run, 4, start=9, eos_rate=0.1)
    run.mark(12)
    assert run.needed == [4, 8]
    feed(run, 8, start=13)
    run.mark(20)  # The sign is gone, but it came soon after checkpoint 8.
    assert run.needed == [4, 20]


def test_a_policy_that_answers_all_right_stays_sound():
    run = guard()
    feed(run, 8, reward=1.0, groups_with_signal=0.0)
    run.mark(8)
    feed(run, 8, start=9, reward=1.0, groups_with_signal=0.0)
    run.mark(16)
    assert run.sound == 8


def collapsed(**changes):
    """A run whose checkpoint 4 is sound and that collapses at update 12; and the memory at 4."""
    run = guard(**changes)
    feed(run, 4)
    run.mark(4)
    memory = json.loads(json.dumps(run.memory))
    feed(run, 4, start=5)
    run.mark(8)
    feed(run, 4, start=9, reward=0.1)
    assert run.collapse
    return run, memory


def test_going_back_takes_the_memory_and_keeps_the_counts():
    run, memory = collapsed()
    assert run.goes_back() and not run.has_given_up()
    run.go_back(12, memory)
    assert not run.signs and not run.collapse and run.sound == 4 and run.needed == [4]
    assert run.memory['told'] == {'reward': 1, 'collapse': 1}
    assert run.memory['first_sign'] == {'step': 10, 'sign': 'reward'}
    assert feed(run, 4, start=13, reward=0.1)['rollbacks'] == 1
    assert run.goes_back()
    run.go_back(16, memory)
    feed(run, 4, start=17, reward=0.1)
    assert run.has_given_up() and not run.goes_back()


def test_without_a_sound_checkpoint_all_begins_anew():
    run, _ = collapsed()
    run.go_back(12, None)
    assert run.sound is None and not run.needed and not run.memory['recent']


def test_without_rollbacks_a_collapse_is_told_and_nothing_else(capsys):
    run, _ = collapsed(rollbacks=0)
    assert not run.goes_back() and not run.has_given_up()
    last = capsys.readouterr().out.splitlines()[-1]
    assert 'has collapsed: reward is ' in last and 'checkpoint 4' in last


@pytest.mark.parametrize(('share', 'norm'), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.1)])
def test_a_run_whose_rewards_were_all_equal_says_so_in_one_line(share, norm):
    """But not if a method that does not compare completions had a gradient."""
    run = guard()
    feed(run, 8, groups_with_signal=0.0, gradient_norm=0.0)
    feed(run, 1, start=9, groups_with_signal=share, gradient_norm=norm)
    result = {'base_accuracy': 0.0, 'accuracy': 0.0, 'seconds': 1.0, 'scorer': 'compact'}
    lines = closing_lines(result | {'guard': outcome(run.memory)}, Path('run')).splitlines()
    without = closing_lines(result, Path('run')).splitlines()
    if share or norm:
        assert lines == without
    else:
        assert lines[1:] == without and 'no group of the whole run' in lines[0]


def test_a_memory_that_was_saved_goes_on_as_it_was():
    whole, first = guard(), guard()
    series = [{'reward': 0.4 - 0.03 * i, 'gradient_norm': 1 / (i + 1)} for i in range(12)]
    for step, row in enumerate(series):
        expected = whole.read(HEALTHY | {'step': step} | row)
    for step, row in enumerate(series[:7]):
        first.read(HEALTHY | {'step': step} | row)
    second = guard()
    second.memory |= json.loads(json.dumps(first.memory))
    for step, row in enumerate(series[7:], 7):
        figures = second.read(HEALTHY | {'step': step} | row)
    assert figures == expected and second.memory == whole.memory
