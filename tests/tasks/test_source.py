"""Problems on disk: made once, read at random, damage named with its remedy."""

import pickle
import shutil

import pytest

from spg_jax import tasks
from spg_jax.tasks.countdown import problems as countdown
from spg_jax.tasks.sudoku import problems as sudoku

pytestmark = pytest.mark.fast


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    tasks.get('sudoku').source('train', folder)
    return folder


@pytest.fixture
def copy(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / 'data')


def train_file(folder):
    return next(folder.glob('sudoku/*/*train.array_record*'))


def test_sudoku_reads_back_what_was_generated(data_dir):
    for split, drawn in sudoku.generate().items():
        source = tasks.get('sudoku').source(split, data_dir)
        expected = [
            {'puzzle': puzzle, 'solution': solution, 'index': index}
            for index, (puzzle, solution) in enumerate(drawn)
        ]
        assert len(source) == len(expected)
        assert list(source) == expected
        assert source[7] == expected[7]
        assert source.__getitems__([5, 3]) == [expected[5], expected[3]]


def test_countdown_reads_back_what_was_generated(tmp_path, capsys):
    for split, drawn in countdown.generate().items():
        source = tasks.get('countdown').source(split, tmp_path)
        assert len(source) == len(drawn)
        for index in (0, 100, len(drawn) - 1):
            numbers, target = drawn[index]
            example = source[index]
            assert example == {'numbers': list(numbers), 'target': target, 'index': index}
            assert {type(value) for value in (*example['numbers'], example['target'])} == {int}
    assert capsys.readouterr().out == ''


def test_made_once(data_dir):
    before = train_file(data_dir).stat().st_mtime_ns
    tasks.get('sudoku').source('test', data_dir)
    assert train_file(data_dir).stat().st_mtime_ns == before


def test_a_source_can_be_sent_to_another_process(data_dir):
    source = tasks.get('sudoku').source('validation', data_dir)
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_index_out_of_range(data_dir):
    source = tasks.get('sudoku').source('validation', data_dir)
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


def test_unknown_split(data_dir):
    with pytest.raises(
        ValueError, match="unknown split 'dev'; expected one of train, validation, test"
    ):
        tasks.get('sudoku').source('dev', data_dir)


def test_no_directory(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot hold data .*; choose another directory'):
        tasks.get('sudoku').source('train', tmp_path / 'file')


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b'')


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    data = bytearray(path.read_bytes())
    data[100_000:100_100] = bytes(byte ^ 0xFF for byte in data[100_000:100_100])
    path.write_bytes(data)


def spoil_info(path):
    (path.parent / 'dataset_info.json').write_text('{')


def remove_info(path):
    (path.parent / 'dataset_info.json').unlink()


def test_the_remedy_helps(copy):
    cut(train_file(copy))
    shutil.rmtree(copy / 'sudoku')
    assert len(list(tasks.get('sudoku').source('train', copy))) == sudoku.SIZES['train']


@pytest.mark.parametrize('damage', [remove, empty, cut, garble, spoil_info, remove_info])
def test_damage_is_named_with_its_remedy(copy, damage):
    damage(train_file(copy))
    with pytest.raises(ValueError) as error:
        list(tasks.get('sudoku').source('train', copy))
    message = str(error.value)
    assert message.endswith(f'delete {copy / "sudoku"} and run again') and '\n' not in message
