"""Comparing methods: what is run, what is held equal, what goes wrong, and what the figures say.

Most tests put a function of seed and learning rate in the place of a run, which leaves the same
files. The last test makes real runs.
"""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from configs import compare as presets
from spg_jax import compare, train
from spg_jax.assembly import assemble, model_of
from spg_jax.comparison import report
from spg_jax.comparison.measure import seconds_per_update, thinned
from spg_jax.comparison.plan import Job
from spg_jax.comparison.reading import complete_comparison, read
from spg_jax.comparison.records import OtherProtocol, Records, newest, read_lines
from spg_jax.comparison.report import band, write_report
from spg_jax.comparison.statistics import estimate, paired_difference, percent
from spg_jax.comparison.tuning import best_rate, next_rate
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.process.config_flag import UnusableConfig, read_config
from spg_jax.process.files import write_whole
from spg_jax.process.interruption import Interruption
from spg_jax.runs import plots, policies, preparation
from spg_jax.tasks.card import Card
from spg_jax.tasks.countdown import Countdown
from spg_jax.tasks.listed import Listed
from tests import adapted
from tests.meshes import mesh_of
from tests.parameters import random_params

fast = pytest.mark.fast
GUARD = {'rollbacks': 0, 'window': 20, 'reward_fall': 0.5, 'accuracy_fall': 0.5, 'skipped': 5}


# --- statistics ---
@fast
def test_an_interval_is_that_of_students_t():
    """With two values half the width is t |a - b| / 2, t = tan(0.475 pi), the Cauchy quantile."""
    mean, half, number = estimate([0.2, 0.6])
    assert (mean, number) == (pytest.approx(0.4), 2)
    assert_allclose(half, math.tan(0.475 * math.pi) * 0.4 / 2, rtol=1e-12)
    # With three, t^2 = 2 (2 p - 1)^2 / (1 - (2 p - 1)^2) at p = 0.975, and s = 1 here.
    t = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))
    assert_allclose(estimate([1.0, 2.0, 3.0]).half, t / math.sqrt(3), rtol=1e-12)
    assert estimate([0.3]) == (0.3, None, 1)
    with pytest.raises(ValueError, match='no value'):
        estimate([])


@fast
def test_a_paired_difference_takes_the_seeds_that_both_have():
    values, reference = {0: 0.5, 1: 0.8, 7: 0.1}, {0: 0.3, 1: 0.4, 2: 0.9}
    difference = paired_difference(values, reference)
    assert_allclose(difference.mean, (0.2 + 0.4) / 2)
    assert_allclose(difference.half, math.tan(0.475 * math.pi) * 0.2 / 2)
    assert paired_difference(values, {3: 1.0}) is None
    assert percent(estimate([0.5, 0.5]), signed=True) == '+50.0 ± 0.0' and percent(None) == '–'


# --- learning rates ---
@fast
@pytest.mark.parametrize(
    ('accuracies', 'tried', 'best'),
    [
        ((0.1, 0.2, 0.3), [2, 3], 3),  # The first two decide.
        ((0.1, 0.3, 0.2), [2, 3, 1], 2),
        ((0.3, 0.2, 0.1), [2, 3, 1], 1),
        ((0.2, 0.2, 0.2), [2, 3, 1], 1),  # Of equal ones the smallest counts.
        ((0.1, None, 0.2), [2, 3], 3),  # A run that failed is worse than any.
        ((0.1, 0.2, None), [2, 3, 1], 2),
        ((None, None, None), [2, 3, 1], None),
        ((0.4,), [], 1),
        ((0.1, 0.2), [1, 2], 2),
        ((0.1, 0.2, 0.3, 0.4, 0.5), [3, 4, 5], 5),
        ((0.5, 0.4, 0.3, 0.2, 0.1), [3, 4, 2, 1], 1),
        ((0.1, 0.5, 0.4, 0.2, 0.1), [3, 4, 2, 1], 2),
    ],
)
def test_the_climb_over_the_grid(accuracies, tried, best):
    grid = tuple(float(place) for place in range(1, len(accuracies) + 1))
    scores, order = {}, []
    while rate := next_rate(grid, scores):
        order.append(rate)
        accuracy = accuracies[int(rate) - 1]
        scores[rate] = None if accuracy is None else (accuracy, 0.0)
    assert order == tried and best_rate(grid, scores) == best


# --- what is run ---
def comparison_of(preset='smoke', **changes):
    config = presets.get_config(preset)
    with config.unlocked():
        for key, value in changes.items():
            config[key] = value
    return read(config)


@fast
@pytest.mark.parametrize('preset', presets.PRESETS)
def test_every_arm_of_every_preset_can_be_run(preset):
    comparison = comparison_of(preset)
    comparison.check()
    task, reference = comparison.cells()[0]
    assert reference == comparison.reference
    # The reference makes the updates that its task names.
    steps = comparison.config_of(comparison.jobs(task, reference, 1e-3)[0]).train.steps
    name, *words = comparison.tasks[task].split()
    configured = dict(word.split('=') for word in [*words, *comparison.common.split()])
    assert steps == int(configured.get('train.steps', read_config(name).train.steps))


@fast
def test_the_arms_of_a_task_differ_in_the_method_only():
    comparison = comparison_of('full', methods='spg_none d1 dtm just_grpo rejection')
    for task in comparison.tasks:
        configs = [
            comparison.config_of(comparison.jobs(task, method, 1e-3)[2]).to_dict()
            for method in comparison.arms
        ]
        for config in configs:
            for group in ('task', 'base', 'model', 'data'):
                assert config[group] == configs[0][group]
            assert config['rl']['prompts'] == configs[0]['rl']['prompts']
            assert config['rl']['group_size'] == configs[0]['rl']['group_size']
            assert config['evaluation'] | {'every': 0} == configs[0]['evaluation'] | {'every': 0}
            assert config['train']['seed'] == 2 and config['optimizer']['learning_rate'] == 1e-3


@fast
def test_a_published_recipe_leaves_what_is_shared():
    arms = {'spg_mixture': '', 'd1': 'rl.objective=d1 rl.recipe=published'}
    comparison = comparison_of(arms=arms, methods='d1')
    config = comparison.config_of(Job('countdown_tiny', 'd1', 'seed', 0, 1e-3))
    assert config.rl.inner_updates == 12 and config.rl.group_size == 8
    assert config.optimizer.learning_rate == 1e-3


@fast
def test_shards_share_every_run_once():
    comparison = comparison_of('full')
    for number in (1, 2, 3, 7, 100):
        shards = [comparison.share(index, number) for index in range(number)]
        cells = [cell for shard in shards for cell in shard]
        assert sorted(cells) == sorted(comparison.cells()) and len(set(cells)) == len(cells)
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1
    assert compare.shard_of('3/4') == (3, 4)


@fast
@pytest.mark.parametrize('text', ['4/4', '0/0', '1', '-1/2', '1/2/3', 'a/b', ''])
def test_a_shard_out_of_range_is_refused(text):
    with pytest.raises(ValueError, match='use i/n with i from 0 to n - 1') as error:
        compare.shard_of(text)
    assert '\n' not in str(error.value)


@fast
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'methods': 'spg_mixtur'}, "method is 'spg_mixtur', perhaps spg_mixture; use one of"),
        ({'tasks': 'countdwn'}, "task is 'countdwn', perhaps countdown; use one of"),
        ({'reference': 'd2x'}, "reference is 'd2x', perhaps d2"),
        ({'seeds_of': {'d11': 2}}, "seeds_of is 'd11', perhaps d1"),
        ({'budget': 'update'}, "budget is 'update', perhaps updates"),
        ({'rates': (1e-3, 1e-4)}, 'use ascending positive numbers'),
        ({'rates': ()}, 'use ascending positive numbers'),
        ({'seeds': 0}, 'seeds of spg_mixture is 0; use 1 or more'),
        ({'tuning_seed': 1}, 'tuning_seed is 1, and figures come from the seeds 0 to 1'),
        ({'tuning_share': 0.0}, 'tuning_share is 0.0'),
        ({'validations': 0}, 'validations is 0'),
        ({'arms': {'spg_mixture': 'rl.prompts=2', 'd1': ''}}, 'arm spg_mixture sets rl.prompts'),
        ({'arms': {'spg_mixture': '', 'd1': 'base.seed=2'}}, 'arm d1 sets base.seed, which all'),
        ({'arms': {'spg_mixture': 'eubo', 'd1': ''}}, "'eubo' is no setting; use GROUP.KEY=VALUE"),
        ({'overrides': 'train.seed=4'}, 'overrides sets train.seed, .* use --config.seeds'),
        ({'common': 'optimizer.learning_rate=4'}, 'common sets optimizer.l.* use --config.rates'),
        ({'overrides': 'wd1.temperature=2'}, 'no arm of .* has the setting wd1.temperature'),
        ({'overrides': 'spg.beta=x'}, "spg.beta is 'x'; use a value like 1.5"),
        ({'overrides': 'spg.bta=2'}, 'no setting spg.bta; use spg.beta'),
        ({'overrides': 'corruption.draws=0'}, 'countdown_tiny, spg_mixture: corruption.draws'),
        (
            {'arms': {'spg_mixture': '', 'd1': 'rl.objective=d11'}},
            "countdown_tiny, d1: rl.objective is 'd11': use d1",
        ),
        ({'configs': {'countdown_tiny': 'countdwn'}}, "task countdown_tiny: no configuration 'cou"),
        ({'configs': {'countdown_tiny': 'compare'}}, 'compare does not describe a run'),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        comparison_of(**changes).check()
    assert '\n' not in str(error.value)


@fast
def test_the_command_line_adds_an_arm_and_refuses_what_is_unknown():
    config = presets.get_config('smoke').lock()
    complete_comparison(config, {'arms.mine': 'spg.beta=2', 'configs.other': 'sudoku:tiny'})
    config.arms.mine, config.methods = 'spg.beta=2', 'mine'
    assert read(config).arms == {'spg_mixture': 'spg.negative=mixture', 'mine': 'spg.beta=2'}
    for key, message in (
        ('spg.beta', "for a setting of all runs use --config.overrides='spg.beta=2'"),
        ('method', 'no setting method of a comparison; use methods'),
        ('arms.a-b', 'letters, digits and underscores'),
    ):
        with pytest.raises(ValueError, match=message):
            complete_comparison(config, {key: '2'})
    with pytest.raises(ValueError, match='--config has no arms, so it is not that of a comparison'):
        complete_comparison(read_config('countdown'), {})
    with pytest.raises(UnusableConfig, match="no preset 'smoek', perhaps smoke; use one of smoke"):
        read_config('compare:smoek')


@fast
def test_the_folder_has_the_name_of_configuration_and_preset():
    assert compare.default_folder('configs/compare.py:smoke') == 'runs/compare-smoke'
    assert compare.default_folder('compare') == 'runs/compare'
    assert compare.default_folder('/a.b/own.py:x') == 'runs/own-x'


# --- runs, played by a function ---
def accuracy_of(config):
    """The figure of a played run: the larger rate is better, and d1 is better than SPG."""
    bonus = {'d1': 0.25, 'spg': 0.125}[config.rl.objective]
    return bonus + 10 * config.optimizer.learning_rate + config.train.seed / 1024


def play(config, workdir, mesh):
    """Leaves the files of a finished run."""
    steps, every = config.train.steps, config.evaluation.every
    rows = [{'step': 0, 'validation_accuracy': 0.0, 'validation_reward': 0.0}]
    for step in range(1, steps + 1):
        rows.append({'step': step, 'loss': 0.0, 'reward': step / steps, 'seconds': 2.0 * step})
        if step % every == 0 or step == steps:
            accuracy = accuracy_of(config) * step / steps
            rows.append(
                {'step': step, 'validation_accuracy': accuracy, 'validation_reward': accuracy}
            )
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    result = {
        'base_accuracy': 0.0625,
        'accuracy': accuracy_of(config),
        'reward': 0.5,
        'best_step': steps,
        'updates': steps,
        'seconds': 3.0 * steps,
        'config': {'guard': GUARD, 'evaluation': {'every': every, 'problems': 16}},
    }
    (workdir / 'result.json').write_text(json.dumps(result))
    return True


def play_all(patch):
    """From now on runs of comparisons are played."""
    patch.setattr(compare, 'find_or_make_base', lambda *_: Path('base'))
    patch.setattr(compare, '_mesh_for', lambda *_: mesh_of())
    patch.setattr(compare, 'make_run', play)
    identity = {'base policy': {'countdown_tiny': 'digest'}}
    patch.setattr(compare, 'identity_of', lambda *_: identity)


@pytest.fixture
def played(monkeypatch, tmp_path):
    """A folder in whose comparisons runs are played; the function that plays may be replaced."""
    play_all(monkeypatch)
    return tmp_path / 'results'


@pytest.fixture
def undrawn(monkeypatch):
    """Reports have no pictures, of which one test is enough."""
    monkeypatch.setattr(report, 'draw', lambda *_: None)


@pytest.fixture(scope='module')
def finished_once(tmp_path_factory):
    """The folder of a whole comparison whose runs are played."""
    folder = tmp_path_factory.mktemp('finished') / 'results'
    with pytest.MonkeyPatch.context() as patch:
        play_all(patch)
        compare.compare(comparison_of(), folder)
    return folder


@pytest.fixture
def finished(finished_once, played):
    """A copy of that folder, which a test may change."""
    return shutil.copytree(finished_once, played)


def lines_in(folder):
    """The lines of a folder, without clocks."""
    clocks = ('seconds', 'seconds_per_update')
    lines = [json.loads(line) for line in (folder / 'runs.jsonl').read_text().splitlines()]
    return [{key: line[key] for key in line if key not in clocks} for line in lines]


@fast
def test_a_rate_is_chosen_on_validation_and_seeds_follow(played):
    outcome = compare.compare(comparison_of(), played)
    assert outcome == (True, {})
    lines = lines_in(played)
    order = [(line['method'], line['role'], line['seed'], line['learning_rate']) for line in lines]
    tuning = [('tuning', 100, 1e-3), ('tuning', 100, 3e-3)]
    seeds = [('seed', 0, 3e-3), ('seed', 1, 3e-3)]
    assert order == [(m, *job) for m in ('spg_mixture', 'd1') for job in tuning + seeds]
    assert not any('accuracy' in line for line in lines if line['role'] == 'tuning')
    # Two updates of SPG are 32 x 12 denoising steps and 2 x 32 x 4 draws both ways, together 896
    # sequences; two of d1 are 384, 64 of the policy that sampled, and 2 x 32 x 3, together 640.
    spg, d1 = lines[2], lines[6]
    assert (spg['updates'], spg['forward'], spg['backward']) == (6, 1920, 768)
    assert (d1['updates'], d1['forward'], d1['backward']) == (8, 2304, 256)
    assert_allclose(d1['accuracy'], 0.25 + 0.03)
    assert len(d1['validations']) == len(spg['validations']) == 3  # the base policy's is the first
    assert compare.compare(comparison_of(), played) == (True, {})
    assert lines_in(played) == lines  # Nothing is run again.


@fast
def test_shards_one_after_the_other_write_what_one_start_writes(finished, tmp_path):
    shared = tmp_path / 'shared'
    for index in (1, 0):
        compare.compare(comparison_of(), shared, (index, 2))
        compare.compare(comparison_of(), shared, (index, 2))
    assert sorted(lines_in(shared), key=str) == sorted(lines_in(finished), key=str)


@fast
def test_a_run_that_fails_is_named_and_the_rest_goes_on(played, undrawn, monkeypatch, capsys):
    def fails_once(config, workdir, mesh):
        if config.rl.objective == 'spg' and config.train.seed == 0:
            raise FloatingPointError('20 non-finite updates\nin a row')
        return play(config, workdir, mesh)

    monkeypatch.setattr(compare, 'make_run', fails_once)
    finished, failures = compare.compare(comparison_of(), played)
    job = Job('countdown_tiny', 'spg_mixture', 'seed', 0, 3e-3)
    assert finished and failures == {job: '20 non-finite updates in a row'}
    assert f'FAILED {job.name}: 20 non-finite updates in a row\n' in capsys.readouterr().err
    lines = lines_in(played)
    assert [line['status'] for line in lines].count('failed') == 1 and len(lines) == 8
    assert 'failed: spg_mixture, seed 0' in write_report(lines_of(played), played)
    monkeypatch.setattr(compare, 'make_run', play)  # The next start tries it again.
    assert compare.compare(comparison_of(), played) == (True, {})
    assert newest(lines_of(played))[job]['status'] == 'finished'


@fast
def test_figures_of_unlike_protocols_have_no_table(finished, undrawn):
    lines = [line for line in lines_of(finished) if line['role'] == 'seed']
    card = Card('countdown', length=12, shots=0)
    with_cards = [line | {'card': card.to_json()} for line in lines]
    assert 'spg_mixture' in write_report(with_cards, finished)
    with_cards[-1]['card'] = dataclasses.replace(card, shots=3).to_json()
    with pytest.raises(ValueError, match='seed 1 may not stand .* shots 0 and 3;') as error:
        write_report(with_cards, finished)
    assert '\n' not in str(error.value)


def lines_of(folder):
    return read_lines(folder / 'runs.jsonl')


@fast
def test_an_arm_without_a_learning_rate_is_left_out(played, monkeypatch, capsys):
    def fails(config, workdir, mesh):
        if config.rl.objective == 'd1':
            raise KeyError('a bug')
        return play(config, workdir, mesh)

    monkeypatch.setattr(compare, 'make_run', fails)
    finished, failures = compare.compare(comparison_of(), played)
    assert finished and [job.role for job in failures] == ['tuning', 'tuning']
    assert set(failures.values()) == {"KeyError: 'a bug'"}
    assert 'Traceback' in capsys.readouterr().err  # of a bug, which no setting mends
    assert compare.missing_of(comparison_of(), newest(lines_of(played))) == ['countdown_tiny/d1']


@fast
def test_failures_are_the_exit_status_of_the_command(played, monkeypatch, capsys):
    monkeypatch.setattr(compare, 'make_run', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    monkeypatch.setattr(compare.cli, 'compile_cache', lambda: None)
    sources = type('Sources', (), {'file': 'configs/compare.py:smoke'})
    monkeypatch.setattr(compare, 'sources', lambda: sources)
    flags = {'report': '', 'config': presets.get_config('smoke'), 'shard': '0/1', 'jobs': 1}
    flags['workdir'] = str(played)
    monkeypatch.setattr(compare, 'FLAGS', type('Flags', (), flags))
    with pytest.raises(SystemExit) as status:
        compare.main([])
    out = capsys.readouterr().out
    assert status.value.code == 1 and 'disk full' in out and f'table     {played}/table.md' in out


class ShardFlag:
    """FLAGS with a --shard that is given or not."""

    def __init__(self, present):
        self.present = present

    def __getitem__(self, name):
        assert name == 'shard'
        return self


@fast
def test_shards_that_fail_beside_each_other_are_named(played, monkeypatch):
    monkeypatch.setattr(compare, 'FLAGS', ShardFlag(present=False))
    # The shard of the first pair ends well, and that of the second fails before any run.
    shard = "import sys; sys.exit(sys.argv[1] == '--shard=1/2')"
    monkeypatch.setattr(compare, 'command_of', lambda _: [sys.executable, '-c', shard])
    finished, failures = compare.beside_each_other(comparison_of(), played, 2)
    assert finished
    assert [(job.method, message) for job, message in failures.items()] == [
        ('d1', f'see the end of {played}/shards/1.txt')
    ]
    # A run that failed has left its message in its line.
    failed = Job('countdown_tiny', 'd1', 'seed', 1, 3e-3)
    line = compare._line(comparison_of(), failed, 'failed', error='disk full')
    Records(played).add(line)
    _, failures = compare.beside_each_other(comparison_of(), played, 2)
    assert failures == {failed: 'disk full'}
    monkeypatch.setattr(compare, 'FLAGS', ShardFlag(present=True))
    with pytest.raises(ValueError, match='--jobs given with --shard'):
        compare.beside_each_other(comparison_of(), played, 2)


@fast
def test_a_folder_of_another_protocol_is_refused(finished):
    before = (finished / 'runs.jsonl').read_bytes()
    for changes, message in (
        ({'rates': (1e-3, 2e-3)}, r'another rule rates \[0.001, 0.003\], asked for \[0.001, 0.002'),
        ({'budget': 'updates'}, "another rule budget 'sequences', asked for 'updates'"),
        (
            {'overrides': 'sampling.top_k=5'},
            'another task countdown_tiny: sampling.top_k 0, a.* 5',
        ),
        ({'overrides': 'spg.beta=4'}, "another arm spg_mixture: spg.beta unset, asked for '4'"),
        ({'overrides': 'train.steps=8'}, 'another task countdown_tiny: train.steps 6, asked for 8'),
        ({'common': 'evaluation.problems=4'}, 'another task countdown_tiny: .*, asked for'),
        ({'arms': {'spg_mixture': '', 'd1': 'rl.objective=wd1'}}, 'another arm spg_mixture: spg.n'),
    ):
        with pytest.raises(OtherProtocol, match=message) as error:
            compare.compare(comparison_of(**changes), finished)
        assert '\n' not in str(error.value) and str(finished) in str(error.value)
    # More seeds and another arm are no other protocol.
    arms = {'spg_mixture': 'spg.negative=mixture', 'elbo': 'spg.negative=elbo'}
    compare.compare(comparison_of(arms=arms, methods='elbo', seeds=3), finished)
    assert (finished / 'runs.jsonl').read_bytes().startswith(before)


@fast
def test_a_folder_of_another_base_policy_is_refused(played, monkeypatch):
    comparison = comparison_of()
    compare.compare(comparison, played, (0, 2))
    another = {'base policy': {'countdown_tiny': 'another digest'}}
    monkeypatch.setattr(compare, 'identity_of', lambda *_: another)
    with pytest.raises(OtherProtocol, match='another base policy countdown_tiny') as error:
        compare.compare(comparison, played, (1, 2))
    assert '\n' not in str(error.value) and len(lines_in(played)) == 4
    (played / 'protocol.json').unlink()
    with pytest.raises(OtherProtocol, match='protocol.json is gone'):
        compare.compare(comparison, played)


@fast
def test_a_damaged_line_is_set_aside_and_its_run_comes_again(finished, capsys):
    whole = (finished / 'runs.jsonl').read_bytes()
    path, lines = finished / 'runs.jsonl', whole.splitlines(keepends=True)
    # One line is no object, one lacks a field, and the last was cut while it was written.
    broken = [lines[0], b'[1]\n', b'{"task": "countdown"}\n', *lines[1:-1], lines[-1][:40]]
    path.write_bytes(b''.join(broken))
    assert len(read_lines(path)) == 7 and path.read_bytes() == b''.join(broken)
    compare.compare(comparison_of(), finished)
    assert path.read_bytes().splitlines()[:7] == whole.splitlines()[:7]
    assert len(lines_in(finished)) == 8
    aside = (finished / 'runs.jsonl.damaged').read_bytes()
    assert aside == b'[1]\n{"task": "countdown"}\n' + lines[-1][:40] + b'\n'
    assert '3 damaged lines set aside in' in capsys.readouterr().out


@fast
def test_a_line_after_one_that_was_cut_stays_whole(tmp_path):
    records = Records(tmp_path)
    records.path.write_bytes(b'{"task": ')
    records.add({'task': 'x'})
    assert records.path.read_bytes() == b'{"task": \n{"task": "x"}\n'


# --- what figures say ---
@fast
def test_the_table_and_the_curves_come_from_lines_alone(finished, tmp_path):
    copy = tmp_path / 'lines.jsonl'
    shutil.copy(finished / 'runs.jsonl', copy)
    compare.report(copy, tmp_path / 'drawn')
    text = (tmp_path / 'drawn' / 'table.md').read_text()
    assert text == write_report(lines_of(finished), tmp_path / 'again') + '\n'
    row = next(line for line in text.splitlines() if line.startswith('| d1 |'))
    cells = [cell.strip() for cell in row.strip('|').split('|')]
    # 0.28 with seed 0 and 1/1024 more with seed 1; 12.5 points above SPG with either.
    half = 100 * math.tan(0.475 * math.pi) / 1024 / 2
    assert cells[1:5] == ['0.003', '2', f'28.0 ± {half:.1f}', '+12.5 ± 0.0']
    assert (tmp_path / 'drawn' / 'countdown_tiny.png').stat().st_size > 10_000
    for path, message in ((tmp_path / 'none', 'does not exist'), (tmp_path, 'does not exist')):
        with pytest.raises(FileNotFoundError, match=message):
            compare.report(path, tmp_path)
    write_whole(tmp_path / 'empty.jsonl', '')
    with pytest.raises(ValueError, match='has no line'):
        compare.report(tmp_path / 'empty.jsonl', tmp_path)


@fast
def test_editing_has_a_table_of_its_own(finished, undrawn, tmp_path):
    """Of each policy the accuracy of drafts and answers over seeds, and what editing changed."""
    lines = [line for line in lines_of(finished) if line['role'] == 'seed']  # of seeds 0 and 1
    methods = {line['method'] for line in lines}
    assert 'draft' not in write_report(lines, tmp_path)
    edited = [
        line
        | {'base_accuracy': 0.2, 'base_draft_accuracy': 0.1, 'draft_accuracy': 0.5}
        | {'accuracy': 0.7 + 0.1 * line['seed'], 'base_wrong_to_right': 4}
        | {'base_right_to_wrong': 0, 'wrong_to_right': 10 + line['seed'], 'right_to_wrong': 1}
        for line in lines
    ]
    table = write_report(edited, tmp_path).partition('| test | draft |')[2].splitlines()
    half = 12.706 * 0.1 / 2  # Student's t of one degree of freedom, times s / sqrt(2)
    spread = f'± {100 * half:.1f}'
    assert '| base policy | 10.0 ± 0.0 | 20.0 ± 0.0 | +10.0 ± 0.0 | 4.0 | 0.0 |' in table
    for method in methods:
        row = f'| {method} | 50.0 ± 0.0 | 75.0 {spread} | +25.0 {spread} | 10.5 | 1.0 |'
        assert row in table


def test_a_band_is_taken_where_all_curves_have_a_point():
    curves = [[(2, 0.5), (4, 1.0)], [(2, 0.25), (4, 0.5), (6, 1.0)]]
    assert band(curves) == ([2, 4], [0.25, 0.5], [0.375, 0.75], [0.5, 1.0])
    assert thinned([(n, float(n)) for n in range(1, 6)], 3) == [(2, 1.5), (4, 3.5), (5, 5.0)]


@fast
def test_the_seconds_of_an_update_count_rollouts_and_leave_validations_out():
    """Updates take 1 s, rollouts before every second update 4 s more, each validation 50 s."""
    seconds, rows = 30.0, []  # The first update compiled.
    for step in range(1, 41):
        if step > 1:
            seconds += 1 + 4 * ((step - 1) % 2 == 0) + 50 * ((step - 1) % 10 == 0)
        rows.append({'step': step, 'reward': 0.5, 'seconds': seconds})
    mean = seconds_per_update(rows, lambda step: int(step % 2 == 0), 10)
    assert_allclose(mean, (20 * 1 + 19 * 5) / 39)
    assert seconds_per_update(rows[:2], lambda step: int(step % 2 == 0), 10) == 1.0
    # All updates after a rollout came after a validation, so nobody knows what they take.
    assert seconds_per_update(rows, lambda step: int(step % 10 == 0), 10) is None


# --- real runs ---
class CutAt(Interruption):
    """Asks to stop after some updates, of all runs together."""

    left = 10**9

    def requested(self) -> bool:
        CutAt.left -= 1
        return CutAt.left <= 0


def make_sum_update(policy, objective, optimizer, batching, seed, shardings):
    """An update without the model: parameters move by the mean token of prompts and completions,
    and a parameter is reported as the reward. Each row of metrics hence depends on all before."""

    def update(state, rollout):
        move = 1e-3 * (rollout.completion.mean() + 7 * rollout.prompt.mean())
        trained = jax.tree.map(lambda x: x + move, state.trained)
        state = state.replace(step=state.step + 1, trained=trained)
        value = trained['params']['embedding'][0, 0]
        names = ('loss', 'reward', 'gradient_norm', 'groups_with_signal')
        return state, {name: (value, jnp.float32(1)) for name in names}

    return jax.jit(update, out_shardings=(shardings, None))


def save_random_base(directory):
    """A base policy of random parameters, for the task of `comparison_of`."""
    config = read_config('countdown:tiny')
    tokenizer = WordTokenizer(assemble(config).task.vocabulary)
    policy = policies.make_policy(model_of(config, tokenizer.size, 'cpu'), tokenizer)
    variables = {'params': random_params(policy.model)}
    policies.save_policy(directory, variables, policy.config, tokenizer, {})


@pytest.fixture
def cheap(monkeypatch, undrawn):
    """Real runs of one arm on one device, in which neither samplers nor updates have the model,
    since what those compute is in tests/rl. There are few problems, since each start measures all
    of them. Runs of the other arm, the reference, are played."""
    problems = Listed(adapted.PROBLEMS, digest='few')
    monkeypatch.setattr(Countdown, 'source', lambda self, split, folder: problems)
    adapted.evaluate_without_the_model(monkeypatch)
    adapted.sample_without_the_model(monkeypatch)
    monkeypatch.setattr(preparation, 'make_update', make_sum_update)
    monkeypatch.setattr(plots, 'curves', lambda _: None)
    monkeypatch.setattr(compare, '_mesh_for', lambda *_: mesh_of())
    make_run = compare.make_run

    def played_or_made(config, workdir, mesh):
        make = play if config.spg.negative == 'mixture' else make_run
        return make(config, workdir, mesh)

    monkeypatch.setattr(compare, 'make_run', played_or_made)


def test_a_comparison_that_is_cut_writes_what_a_whole_one_writes(cheap, tmp_path, monkeypatch):
    """The reference is played, the second run is cut after two updates and goes on; without a cut,
    in another folder, it gives the same line."""
    save_random_base(tmp_path / 'base')
    overrides = f'base.checkpoint={tmp_path}/base rl.prompts=2'
    arms = {'spg_mixture': 'spg.negative=mixture', 'elbo': 'spg.negative=elbo'}
    comparison = comparison_of(
        arms=arms, methods='spg_mixture elbo', seeds=1, rates=(1e-3,), overrides=overrides
    )
    monkeypatch.setattr(train, 'Interruption', CutAt)
    monkeypatch.setattr(CutAt, 'left', 2)  # updates
    cut, whole = tmp_path / 'cut', tmp_path / 'whole'
    assert compare.compare(comparison, cut) == (False, {})
    assert [line['method'] for line in lines_in(cut)] == ['spg_mixture']
    shutil.copytree(cut, whole)
    shutil.rmtree(whole / 'runs' / 'countdown_tiny' / 'elbo')
    CutAt.left = 10**9
    assert compare.compare(comparison, cut) == (True, {})
    assert compare.compare(comparison, whole) == (True, {})
    lines = lines_in(cut)
    assert lines == lines_in(whole) and [line['method'] for line in lines] == [
        'spg_mixture',
        'elbo',
    ]
    assert all(len(line['rewards']) == line['updates'] >= 6 for line in lines)
    assert len({reward for _, reward in lines[1]['rewards']}) == lines[1]['updates']
    protocol = json.loads((cut / 'protocol.json').read_text())
    digests = *protocol['base policy'].values(), *protocol['problems'].values()
    assert len(digests) == 2 and all(digests)
    output = cut / 'runs' / 'countdown_tiny' / 'elbo' / 'seed-0-0.001' / 'output.txt'
    assert 'stopped after update 2, saved' in output.read_text()
    card = lines[1]['card']  # The line of the played run has none.
    assert '| elbo |' in write_report([line | {'card': card} for line in lines_of(cut)], cut)
