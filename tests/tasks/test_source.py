"""Problems on disk: made once with one line on the screen, read in any order, damage named."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest

from spg_jax import tasks
from spg_jax.tasks.countdown import problems as countdown
from spg_jax.tasks.sudoku import problems as sudoku
from tests import processes


@pytest.fixture(scope='module', autouse=True)
def drawn():
    """The problems of both tasks, by name; a folder that is made is made of the same ones."""
    with pytest.MonkeyPatch.context() as patch:
        processes.draw_few_problems(patch)
        problems = {'sudoku': sudoku.generate(), 'countdown': countdown.generate()}
        patch.setattr(sudoku, 'generate', lambda: problems['sudoku'])
        patch.setattr(countdown, 'generate', lambda: problems['countdown'])
        yield problems


@pytest.fixture
def copy(data_dir, tmp_path):
    tasks.get('sudoku').source('train', data_dir)
    return shutil.copytree(data_dir / 'sudoku', tmp_path / 'data' / 'sudoku').parent


def train_file(folder):
    return next(folder.glob('sudoku/*/*train.array_record*'))


def test_sudoku_reads_back_what_was_generated(data_dir, drawn):
    for split, problems in drawn['sudoku'].items():
        source = tasks.get('sudoku').source(split, data_dir)
        expected = [
            {'puzzle': puzzle, 'solution': solution, 'index': index}
            for index, (puzzle, solution) in enumerate(problems)
        ]
        assert len(source) == len(expected)
        assert list(source) == expected
        assert source[7] == expected[7]
        assert source.__getitems__([5, 3]) == [expected[5], expected[3]]


def test_countdown_reads_back_what_was_generated(data_dir, drawn):
    for split, problems in drawn['countdown'].items():
        source = tasks.get('countdown').source(split, data_dir)
        assert len(source) == len(problems)
        for index in (0, 100, len(problems) - 1):
            numbers, target = problems[index]
            example = source[index]
            assert example == {'numbers': list(numbers), 'target': target, 'index': index}
            assert {type(value) for value in (*example['numbers'], example['target'])} == {int}


def test_made_once(copy):
    before = train_file(copy).stat().st_mtime_ns
    tasks.get('sudoku').source('test', copy)
    assert train_file(copy).stat().st_mtime_ns == before


PROGRAM = """
import sys
from absl import app
from spg_jax import tasks

def main(argv):
    folder, *names = argv[1:]
    for name, format in zip(names[::2], names[1::2]):
        task = tasks.get(name, format)
        print(len(task.source('train', folder)), len(task.source('validation', folder)))

app.run(main)
"""


def screen_of(*arguments):
    """Runs PROGRAM as entry points run; returns what it writes to (standard output, error)."""
    command = [sys.executable, '-c', PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_problems_are_announced_on_one_line_when_they_are_made(tmp_path):
    """Of drawn problems, and of published ones. A second start announces nothing."""
    for split in ('train', 'test'):
        records = [{'question': f'Is it {split} {n}?', 'answer': f'#### {n}'} for n in range(20)]
        (tmp_path / f'gsm8k_{split}.jsonl').write_text('\n'.join(map(json.dumps, records)))
    lines = (
        f'problems of sudoku: making 20,512 (less than a minute), once, under {tmp_path}/sudoku\n'
        'problems of gsm8k: cutting the published files, which are downloaded if missing, once, '
        f'under {tmp_path}/gsm8k\n'
    )
    arguments = tmp_path, 'sudoku', 'compact', 'gsm8k', 'published_train'
    assert screen_of(*arguments) == ('20000 256\n18 2\n', lines)
    assert screen_of(*arguments) == ('20000 256\n18 2\n', '')


def test_a_source_can_be_sent_to_another_process(data_dir):
    source = tasks.get('sudoku').source('validation', data_dir)
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_index_out_of_range(data_dir):
    source = tasks.get('sudoku').source('validation', data_dir)
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


def test_unknown_split(data_dir):
    with pytest.raises(ValueError, match="split is 'dev'; use one of train, validation, test"):
        tasks.get('sudoku').source('dev', data_dir)


def test_no_directory(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot hold data .*; start in a directory that'):
        tasks.get('sudoku').source('train', tmp_path / 'file')


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b'')


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 100)
    data[middle] = bytes(byte ^ 0xFF for byte in data[middle])
    path.write_bytes(data)


def spoil_info(path):
    (path.parent / 'dataset_info.json').write_text('{')


def remove_info(path):
    (path.parent / 'dataset_info.json').unlink()


def test_the_remedy_helps(copy):
    cut(train_file(copy))
    (copy / 'sudoku').rename(copy / 'away')
    assert len(list(tasks.get('sudoku').source('train', copy))) == sudoku.SIZES['train']


@pytest.mark.parametrize('damage', [remove, empty, cut, garble, spoil_info, remove_info])
def test_damage_is_named_with_its_remedy(copy, damage):
    damage(train_file(copy))
    with pytest.raises(ValueError) as error:
        list(tasks.get('sudoku').source('train', copy))
    message = str(error.value)
    assert message.endswith(f'move {copy / "sudoku"} away and run again') and '\n' not in message
