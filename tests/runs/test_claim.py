"""Who may train in a directory: one at a time, and nobody where something else lies."""

import contextlib
import json

import pytest

from configs import countdown
from spg_jax import train
from spg_jax.process.files import locked
from spg_jax.process.interruption import Interruption
from spg_jax.runs import claim
from spg_jax.runs.claim import claimed
from spg_jax.runs.directory import identity
from spg_jax.runs.report import is_finished
from tests.meshes import mesh_of

pytestmark = pytest.mark.fast
SETTINGS = {'task': {'name': 'countdown'}, 'mesh': {'data': 1}}


def test_the_configuration_of_something_else_is_not_replaced(tmp_path):
    published = '{"d_model": 8, "model_type": "llada"}'
    (tmp_path / 'config.json').write_text(published)
    with pytest.raises(ValueError, match='is not the configuration of a training') as error:
        with claimed(tmp_path, SETTINGS):
            pass
    assert '\n' not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']
    assert (tmp_path / 'config.json').read_text() == published


@pytest.mark.parametrize('finished', [True, False])
def test_settings_that_are_gone_are_not_made_up(tmp_path, finished):
    if not finished:
        (tmp_path / 'checkpoints' / '4').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='config.json is gone, .*; restore') as error:
        with claimed(tmp_path, SETTINGS, finished):
            pass
    assert '\n' not in str(error.value) and not (tmp_path / 'config.json').exists()


def test_a_finished_training_does_not_go_on(tmp_path, capsys):
    config = countdown.get_config('tiny')
    with claimed(tmp_path, identity(config)):
        pass
    before = (tmp_path / 'config.json').read_bytes()
    config.mesh.data = 2
    with claimed(tmp_path, identity(config), finished=True):
        pass
    assert (tmp_path / 'config.json').read_bytes() == before
    assert capsys.readouterr().out == ''


def test_a_finished_run_is_made_longer_from_a_checkpoint_only(tmp_path):
    assert not is_finished(tmp_path, 8)
    figures = {'base_accuracy': 0.5, 'accuracy': 1.0, 'seconds': 3, 'scorer': 'x', 'steps': 8}
    (tmp_path / 'result.json').write_text(json.dumps(figures))
    assert is_finished(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match='result of 8 updates and no checkpoint') as error:
        is_finished(tmp_path, 9)
    assert '\n' not in str(error.value)
    (tmp_path / 'checkpoints' / '8').mkdir(parents=True)
    assert not is_finished(tmp_path, 9)


def test_a_run_that_is_made_longer_has_no_result_until_it_has_ended(tmp_path, monkeypatch):
    """The launchers and `score` take a result for the end of a run."""
    monkeypatch.setattr(train, 'is_finished', lambda *_: False)
    monkeypatch.setattr(train, 'train', lambda *_: (tmp_path / train.RESULT).exists())
    (tmp_path / train.RESULT).write_text('{}')
    assert not train.make_run(countdown.get_config('tiny'), tmp_path, mesh_of())


def test_a_name_that_nothing_could_be_read_from_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match='use a path without brackets'):
        with claimed(tmp_path / 'br[1]', SETTINGS):
            pass
    assert not list(tmp_path.iterdir())


class Asked(Interruption):
    """Asks to stop when it is asked for the second time; then `then` is called."""

    def __init__(self, then):
        super().__init__()
        self._times, self._then = 0, then

    def requested(self):
        self._times += 1
        if self._times == 2:
            self._then()
        return self._times == 2


def test_who_waits_for_another_process_leaves_when_asked_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claim, 'WAIT_SECONDS', 0.0)
    with locked(tmp_path / 'lock'), claimed(tmp_path, SETTINGS, waiting=Asked(list)) as is_free:
        assert not is_free
    assert not (tmp_path / 'config.json').exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'waiting for another process that is training {tmp_path}'
    assert len(lines) == 2 and lines[1].startswith('stopped while waiting')


def test_who_waits_gets_the_directory_when_it_is_free(tmp_path, monkeypatch):
    class Patient(Asked):
        def requested(self):
            super().requested()
            return False

    monkeypatch.setattr(claim, 'WAIT_SECONDS', 0.0)
    with contextlib.ExitStack() as other:
        other.enter_context(locked(tmp_path / 'lock'))
        with claimed(tmp_path, SETTINGS, waiting=Patient(other.close)) as is_free:
            assert is_free and (tmp_path / 'config.json').exists()
            with pytest.raises(BlockingIOError), locked(tmp_path / 'lock', wait=False):
                pass
