"""The whole pipeline at its tiny preset, as processes: the commands of the README work in their
order, the main job among them resumes, and it says what is wrong.

`.ci/run` runs the two commands that install, as they stand.
"""

import gzip
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from spg_jax import score
from tests import forks, processes
from tests.processes import finish, start_module, tiny_run, wait_until

pytestmark = pytest.mark.compiled_as_users_do
WALL_CLOCK = ('seconds', 'base_seconds')
# It starts as in a notebook whose plots need a package that is not installed here (fault G19).
NOTEBOOK = {'MPLBACKEND': 'module://not_installed.backend'}
REPOSITORY = Path(__file__).parent.parent
# The beginnings of commands that need hours, a download, or a machine, and what runs them small.
ELSEWHERE = {
    'pytest': '.ci/run',
    'spg_jax.compare': 'tests/test_compare.py',
    'spg_jax.plan --config=configs/gsm8k.py:llada_8b': 'tests/planning/test_report.py',
    'spg_jax.train --config=configs/gsm8k.py:llada_8b': 'tests/test_adapted_run.py',
    'spg_jax.evaluate --config=configs/gsm8k.py:llada_8b': 'tests/test_published.py',
    'spg_jax.export': 'tests/test_adapted_run.py',
}
# What other tests look at, beside the commands of the page.
HELP, EXPORT = 'spg_jax.train --help', 'spg_jax.export --workdir=DIR --out'
PROBLEMS = [{'input': '30,100,93', 'output': '23'}, {'input': '1,2,3', 'output': '6'}]
GENERATION = {
    'question': '',
    'ground_truth': [[30, 100, 93], 23],
    'completion': r'\boxed{93 + 30 - 100}',
}


def commands() -> list[str]:
    """What follows `python -m` in the README's blocks of commands, without comments."""
    blocks = re.findall(r'```bash\n(.*?)```', (REPOSITORY / 'README.md').read_text(), re.DOTALL)
    lines = [line.split('  #')[0] for block in blocks for line in block.splitlines()]
    return [
        part.strip().removeprefix('python -m ')
        for line in lines
        for part in line.split('&&')
        if part.strip().startswith('python -m ')
    ]


def runs_here(command: str) -> bool:
    return not any(command.startswith(beginning) for beginning in ELSEWHERE)


def words_of(command: str, workdir: Path | None) -> list[str]:
    """The module and the arguments of the small form of a command."""
    command = re.sub(r'(configs/\w+\.py)(?!:)', r'\1:tiny', command).replace('DIR', str(workdir))
    # Splits at spaces outside of quotes, as a shell would.
    return [re.sub(r"'", '', word) for word in re.findall(r"(?:'[^']*'|\S)+", command)]


def training(workdir: Path, *arguments: str) -> subprocess.Popen:
    """A run whose checkpoint after update 5 lies between two updates on one rollout."""
    return start_module(*tiny_run(workdir, *arguments), **NOTEBOOK)


def rows_of(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in WALL_CLOCK} for row in rows]


def newest_step(workdir: Path) -> int:
    """Updates done at the newest whole checkpoint, 0 without one."""
    names = [path.name for path in (workdir / 'checkpoints').iterdir()]
    return max((int(name) for name in names if name.isdigit()), default=0)


def newest_parameters(workdir: Path) -> dict[str, np.ndarray]:
    state = ocp.load((workdir / 'checkpoints' / str(newest_step(workdir))).absolute())
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


class Page(NamedTuple):
    """The README's commands in a directory of their own, where the main job has run."""

    directory: Path
    job: str  # the command
    out: str  # what it has printed
    workdir: Path  # which the other commands look at
    metrics: str  # of the job


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp('page')
    (directory / 'configs').symlink_to(REPOSITORY / 'configs')
    processes.share_with_runs_in(directory)
    job = next(filter(runs_here, commands()))
    words = [sys.executable, '-m', *words_of(job, None)]
    done = processes.run(words, cwd=directory, env=processes.environment(**NOTEBOOK))
    assert done.returncode == 0, done.stderr
    workdir = directory / re.search('^workdir (.*)$', done.stdout, re.MULTILINE)[1]
    metrics = (workdir / 'metrics.jsonl').read_text()
    return Page(directory, job, done.stdout, workdir, metrics)


@pytest.fixture(scope='module')
def uninterrupted(page):
    return page.workdir, page.out


@pytest.fixture(scope='module')
def ended(page, tmp_path_factory):
    """What every other command of the page has left, and then the job once more and other tests'
    commands, by command."""
    (page.directory / 'countdown_test.jsonl').write_text('\n'.join(map(json.dumps, PROBLEMS)))
    (page.directory / 'generations.jsonl').write_text(json.dumps(GENERATION) + '\n')
    later = [command for command in commands() if runs_here(command) and command != page.job]
    later += [page.job, HELP, f'{EXPORT}={tmp_path_factory.mktemp("export")}/out']
    lines = [words_of(command, page.workdir) for command in later]
    left = forks.run_all([(line[0], page.directory, line[1:]) for line in lines], **NOTEBOOK)
    return dict(zip(later, left, strict=True))


def test_every_command_is_run_here_or_elsewhere():
    for beginning, place in ELSEWHERE.items():
        assert any(command.startswith(beginning) for command in commands()), beginning
        assert (REPOSITORY / place).is_file()


def test_the_commands_work_in_the_order_of_the_page(page, ended):
    rest = [command for command in ended if command in commands() and command != page.job]
    modules = [command.split()[0] for command in rest]
    assert modules.count('spg_jax.train') == 1 and modules.count('spg_jax.evaluate') == 2
    for command in rest:
        code, out, error = ended[command]
        assert code == 0, (command, error)
        last = out.splitlines()[-1]
        if command.startswith(('spg_jax.evaluate', 'spg_jax.score')):
            figures = json.loads(last)
            assert 0 <= figures['accuracy'] <= 1
        if '--data=countdown_test.jsonl' in command:
            stated = {'task': 'countdown', 'total': len(PROBLEMS), 'scorer': 'compact'}
            stated['files'] = ['countdown_test.jsonl']
            assert figures | stated == figures
            assert figures['accuracy'] == figures['correct'] / 2 and 0 <= figures['pass_at_2'] <= 1
        if command.startswith('spg_jax.train'):
            assert 'finished: test ' in out and 'spg_jax.evaluate' in last
        if command.startswith('spg_jax.generate'):
            assert 'step' in out
        if command.startswith('spg_jax.score'):
            assert figures['accuracy'] == 1.0


def test_a_run_leaves_everything_it_promises(uninterrupted):
    workdir, out = uninterrupted
    result = json.loads((workdir / 'result.json').read_text())
    for key in (
        'task objective base_accuracy accuracy base_reward reward base_pass_at_2 pass_at_2 '
        'steps seconds seed config'
    ).split():
        assert key in result, key
    updates = [row for row in rows_of(workdir) if 'loss' in row]
    assert [row['step'] for row in updates] == list(range(1, 9))
    assert all(row['gradient_norm'] > 0 for row in updates[4:])  # what resumes has to move
    for name in ('curves.png', 'completions.jsonl', 'best/policy.json', 'events'):
        assert (workdir / name).exists(), name
    assert 'spg_jax.evaluate' in out.splitlines()[-1]
    again = score.score(None, [str(workdir)])  # of the completions of the test problems
    assert (again['accuracy'], again['card']) == (result['accuracy'], result['card'])
    assert result['card']['checkpoint'] == 'validation'


def test_run_again_says_it_is_finished(page, ended):
    code, out, error = ended[page.job]
    assert code == 0, error
    assert 'finished' in out and out.splitlines()[-1] == page.out.splitlines()[-1]
    assert (page.workdir / 'metrics.jsonl').read_text() == page.metrics


@pytest.fixture(scope='module')
def cut(uninterrupted, tmp_path_factory):
    """A run that is cut after update 5, later than it was to write a trace, and has gone on."""
    workdir = tmp_path_factory.mktemp('cut')
    process = training(workdir, '--config.train.profile=2')
    wait_until((workdir / 'checkpoints' / '5').exists, process)
    process.send_signal(signal.SIGTERM)
    code, out, error = finish(process)
    assert not (workdir / 'result.json').exists(), 'the signal came too late to test anything'
    assert code == 0, error
    assert 'run the same command to go on' in out

    # A machine that dies may lose the end of a file, and a run that is killed has rows of updates
    # after its newest checkpoint. The checkpoint has the last row, too.
    rows = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
    late = (uninterrupted[0] / 'metrics.jsonl').read_text().splitlines(keepends=True)[-1]
    (workdir / 'metrics.jsonl').write_text(''.join([*rows[:-1], late]))
    code, _, error = finish(training(workdir, '--config.train.profile=2'))
    assert code == 0, error
    return workdir, out


def test_a_run_that_is_cut_goes_on_bit_for_bit(uninterrupted, cut):
    """Everything but the clock equals the uninterrupted run. Kills are in benchmarks/faults.py."""
    (whole, _), (workdir, _) = uninterrupted, cut
    assert not (whole / 'profile').exists()  # Nobody asked for a trace, which changes nothing.
    assert rows_of(workdir) == rows_of(whole)
    expected, parameters = newest_parameters(whole), newest_parameters(workdir)
    assert expected.keys() == parameters.keys()
    for name, value in expected.items():
        assert np.array_equal(value, parameters[name]), name


def test_a_trace_names_the_phases_of_one_rollout_and_one_update(cut):
    """Updates 3 and 4 share the first rollout that is collected from update 2 on. It is generated
    block by block."""
    workdir, out = cut
    (trace,) = (workdir / 'profile').rglob('perfetto_trace.json.gz')
    assert f'{trace}: open it at' in out
    events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
    phases = {
        name: [event for event in events if event.get('name') == name and 'dur' in event]
        for name in ('rollout', 'generate', 'decode and reward', 'update')
    }
    assert all(phases.values())
    assert len(phases['rollout']) == len(phases['update']) == 1
    assert int(phases['update'][0]['args']['step_num']) == 2  # updates done before it
    assert phases['rollout'][0]['ts'] < phases['update'][0]['ts']


def test_help_names_the_command(ended):
    code, out, error = ended[HELP]
    assert code == 0, error
    assert 'python -m spg_jax.train' in out


def test_a_small_policy_has_no_layout_for_others(ended):
    code, _, error = next(left for command, left in ended.items() if command.startswith(EXPORT))
    assert code == 1 and 'did not start from a published checkpoint' in error
