"""The whole pipeline at its tiny preset, as processes: it finishes, it resumes, it says what is
wrong."""

import gzip
import json
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from spg_jax import score
from tests.processes import finish, start_module, tiny_run, wait_until

pytestmark = pytest.mark.compiled_as_users_do
WALL_CLOCK = ('seconds', 'base_seconds')


def training(workdir: Path, *arguments: str) -> subprocess.Popen:
    """A run whose checkpoint after update 5 lies between two updates on one rollout.

    It starts as in a notebook whose plots need a package that is not installed here (fault G19).
    """
    command = tiny_run(workdir, *arguments)
    return start_module(*command, MPLBACKEND='module://not_installed.backend')


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


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted')
    code, out, error = finish(training(workdir, '--config.train.profile=2'))
    assert code == 0, error
    return workdir, out


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


def test_a_trace_names_the_phases_of_one_rollout_and_one_update(uninterrupted):
    """Updates 3 and 4 share the first rollout that is collected from update 2 on. It is generated
    block by block."""
    workdir, out = uninterrupted
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


def test_run_again_says_it_is_finished(uninterrupted):
    workdir, _ = uninterrupted
    before = (workdir / 'metrics.jsonl').read_text()
    code, out, _ = finish(training(workdir))
    assert code == 0 and 'finished' in out
    assert (workdir / 'metrics.jsonl').read_text() == before


def test_a_run_that_is_cut_goes_on_bit_for_bit(uninterrupted, tmp_path):
    """Everything but the clock equals the uninterrupted run. Kills are in benchmarks/faults.py."""
    process = training(tmp_path)
    wait_until((tmp_path / 'checkpoints' / '5').exists, process)
    process.send_signal(signal.SIGTERM)
    code, out, error = finish(process)
    assert not (tmp_path / 'result.json').exists(), 'the signal came too late to test anything'
    assert code == 0, error
    assert 'run the same command to go on' in out

    # A machine that dies may lose the end of a file, and a run that is killed has rows of updates
    # after its newest checkpoint. The checkpoint has the last row, too.
    rows = (tmp_path / 'metrics.jsonl').read_text().splitlines(keepends=True)
    late = (uninterrupted[0] / 'metrics.jsonl').read_text().splitlines(keepends=True)[-1]
    (tmp_path / 'metrics.jsonl').write_text(''.join([*rows[:-1], late]))
    code, _, error = finish(training(tmp_path))
    assert code == 0, error
    assert not (tmp_path / 'profile').exists()  # Nobody asked for a trace, which changes nothing.
    assert rows_of(tmp_path) == rows_of(uninterrupted[0])
    expected, parameters = newest_parameters(uninterrupted[0]), newest_parameters(tmp_path)
    assert expected.keys() == parameters.keys()
    for name, value in expected.items():
        assert np.array_equal(value, parameters[name]), name


def test_help_names_the_command():
    code, out, error = finish(start_module('spg_jax.train', '--help'))
    assert code == 1, error  # absl's exit status of --help
    assert 'python -m spg_jax.train' in out


def test_a_small_policy_has_no_layout_for_others(uninterrupted, tmp_path):
    arguments = (f'--workdir={uninterrupted[0]}', f'--out={tmp_path}/out')
    code, _, error = finish(start_module('spg_jax.export', *arguments))
    assert code == 1 and 'did not start from a published checkpoint' in error
