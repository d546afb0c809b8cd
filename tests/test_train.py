"""The whole pipeline at its tiny preset, as processes: it finishes, it resumes, it says what is
wrong."""

import json
import signal
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from spg_jax.runs import policies
from tests.meshes import mesh_of
from tests.processes import REPOSITORY, finish, start_module, wait_until

pytestmark = pytest.mark.compiled_as_users_do
WALL_CLOCK = ('seconds', 'base_seconds')


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """Problems and base policy, made once for all runs of this file."""
    return tmp_path_factory.mktemp('shared')


def start(shared: Path, *arguments: str, module: str = 'train') -> subprocess.Popen:
    return start_module(f'spg_jax.{module}', *arguments, XDG_CACHE_HOME=str(shared))


def training(shared: Path, workdir: Path, *arguments: str) -> subprocess.Popen:
    return start(
        shared,
        f'--config={REPOSITORY}/configs/countdown.py:tiny',
        f'--workdir={workdir}',
        f'--config.task.data_dir={shared}/data',
        f'--config.base.cache={shared}/base',
        '--config.model.scan_unroll=1',  # compiles one layer, not two
        *arguments,
    )


def quick(shared: Path, workdir: Path) -> subprocess.Popen:
    """With a checkpoint between two inner updates, few samples of what costs most, pass@k, and
    batches of 32, as of rollouts, so that one compiled program serves both."""
    return training(
        *(shared, workdir, '--config.checkpoint.every=5', '--config.evaluation.samples=2'),
        '--config.evaluation.batch=32',
    )


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
def uninterrupted(shared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted')
    code, out, error = finish(quick(shared, workdir))
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
    steps = [row['step'] for row in rows_of(workdir) if 'loss' in row]
    assert steps == list(range(1, 9))
    for name in ('curves.png', 'completions.jsonl', 'best/policy.json', 'events'):
        assert (workdir / name).exists(), name
    assert 'spg_jax.evaluate' in out.splitlines()[-1]


def test_run_again_says_it_is_finished(shared, uninterrupted):
    workdir, _ = uninterrupted
    before = (workdir / 'metrics.jsonl').read_text()
    code, out, _ = finish(quick(shared, workdir))
    assert code == 0 and 'finished' in out
    assert (workdir / 'metrics.jsonl').read_text() == before


def resumes_exactly(shared: Path, workdir: Path, whole: Path) -> None:
    """Runs the same command again; everything but the clock must equal the uninterrupted run."""
    code, _, error = finish(quick(shared, workdir))
    assert code == 0, error
    assert rows_of(workdir) == rows_of(whole)
    expected, found = newest_parameters(whole), newest_parameters(workdir)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(value, found[name]), name


def killed_before_its_first_checkpoint(shared: Path, workdir: Path) -> None:
    """Leaves rows of an update that must not be there twice after the next start."""
    process = quick(shared, workdir)
    metrics = workdir / 'metrics.jsonl'
    wait_until(lambda: metrics.exists() and metrics.read_text().count('\n') >= 2, process)
    process.kill()
    finish(process)
    assert not newest_step(workdir)


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_a_run_cut_between_two_inner_updates_goes_on_bit_for_bit(
    shared, uninterrupted, tmp_path, how
):
    """The checkpoint is after update 5, and a rollout serves updates 5 and 6."""
    if how == signal.SIGKILL:
        killed_before_its_first_checkpoint(shared, tmp_path)
    process = quick(shared, tmp_path)
    checkpoint = tmp_path / 'checkpoints' / '5'
    wait_until(checkpoint.exists, process)
    process.send_signal(how)
    code, out, error = finish(process)
    assert not (tmp_path / 'result.json').exists(), 'the signal came too late to test anything'
    if how == signal.SIGTERM:
        assert code == 0, error
        assert 'run the same command to go on' in out
        # A machine that dies may lose the end of a file; the checkpoint has the last row, too.
        rows = (tmp_path / 'metrics.jsonl').read_text().splitlines(keepends=True)
        (tmp_path / 'metrics.jsonl').write_text(''.join(rows[:-1]))
    else:
        assert newest_step(tmp_path) == 5
    resumes_exactly(shared, tmp_path, uninterrupted[0])


def test_a_second_process_is_told_that_one_is_at_work(shared, uninterrupted, tmp_path):
    first = training(shared, tmp_path)
    wait_until((tmp_path / 'config.json').exists, first)
    code, _, error = finish(training(shared, tmp_path))
    first.kill()
    finish(first)
    assert code == 1 and f'another process is training in {tmp_path}' in error


def test_evaluate_ends_with_one_json_object(shared, uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    published = tmp_path / 'two.jsonl'
    published.write_text(
        '{"input": "30,100,93", "output": "23"}\n{"input": "1,2,3", "output": "6"}\n'
    )
    arguments = (f'--workdir={workdir}', f'--data={published}', '--samples=3')
    code, out, error = finish(start(shared, *arguments, module='evaluate'))
    assert code == 0, error
    found = json.loads(out.splitlines()[-1])
    expected = {'task': 'countdown', 'total': 2, 'files': [str(published)], 'scorer': 'compact'}
    assert found | expected == found
    assert found['accuracy'] == found['correct'] / 2 and 0 <= found['pass_at_3'] <= 1


def test_generate_shows_every_step_and_the_completion(shared, uninterrupted):
    workdir, _ = uninterrupted
    arguments = (f'--workdir={workdir}', '--trace', '--prompt=100 93 30 = 23 :')
    code, out, error = finish(start(shared, *arguments, module='generate'))
    assert code == 0, error
    header, *lines = out.splitlines()
    assert 'step' in header and len(lines) >= 6  # a rule, steps of two blocks or more, the text


def test_every_entry_point_has_help(shared):
    modules = ('train', 'pretrain', 'evaluate', 'generate', 'score', 'export')
    for module, process in [(m, start(shared, '--help', module=m)) for m in modules]:
        code, out, error = finish(process)
        assert code == 1, error  # absl's exit status of --help
        assert f'python -m spg_jax.{module}' in out


@pytest.mark.parametrize(
    ('argument', 'said'),
    [
        # tests/test_config.py has every setting; here is one for each place that complains.
        ('--config.rl.microbatch=7', 'rl.microbatch'),
        ('--config.mesh.data=3', 'device'),
        ('--config.base.checkpoint=nowhere', 'nowhere'),
        ('--config.rl.unknown=1', 'unknown'),
    ],
)
def test_what_cannot_work_stops_at_once_with_one_line(
    shared, uninterrupted, tmp_path, argument, said
):
    code, _, error = finish(training(shared, tmp_path / 'run', argument))
    assert code != 0
    assert 'Traceback' not in error
    assert said in error
    assert len([line for line in error.splitlines() if line.startswith('error:')]) == 1


def test_a_run_that_only_skips_stops_with_its_state_saved(shared, uninterrupted, tmp_path):
    """F90: from a policy whose logits overflow no update is finite, not even the last of eight."""
    base = next((shared / 'base').glob('*/policy.json')).parent
    policy, tokenizer, variables = policies.load_policy(base, mesh_of())
    params = variables['params']
    scale = jnp.full_like(params['final_norm']['scale'], 3e38)
    damaged = {'params': params | {'final_norm': {'scale': scale}}}
    policies.save_policy(tmp_path / 'damaged', damaged, policy.config, tokenizer, {})
    process = training(
        shared,
        tmp_path / 'run',
        f'--config.base.checkpoint={tmp_path}/damaged',
        '--config.train.max_skipped=20',
        '--config.checkpoint.every=100',
        '--config.evaluation.samples=2',
    )
    code, _, error = finish(process)
    assert code == 1
    assert '8 non-finite updates in a row' in error and 'Traceback' not in error
    assert rows_of(tmp_path / 'run')[-1]['skipped_in_a_row'] == 8
    assert newest_parameters(tmp_path / 'run')


def test_a_small_policy_has_no_layout_for_others(shared, uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    arguments = (f'--workdir={workdir}', f'--out={tmp_path}/out')
    code, _, error = finish(start(shared, *arguments, module='export'))
    assert code == 1 and 'did not start from a published checkpoint' in error
