"""Published problems: files on disk or downloaded, splits that never change, errors of one line."""

import json
import re

import pytest

from spg_jax import tasks
from spg_jax.tasks import published_files
from spg_jax.tasks.source import ORIGIN, SPLITS

NAMES = ('gsm8k', 'math500')


def line(name, place, note=''):
    """Returns a made-up problem as a line of the published file."""
    if name == 'gsm8k':
        record = {'question': f'What is {place}?{note}', 'answer': f'Itself.\n#### {place}'}
    else:
        record = {'problem': f'What is {place}?{note}', 'solution': rf'$\boxed{{{place}}}$ it is.'}
    return json.dumps(record) + '\n'


def write(folder, name, train=range(40), test=range(40, 45)):
    folder.mkdir(parents=True, exist_ok=True)
    for split, places in (('train', train), ('test', test)):
        (folder / f'{name}_{split}.jsonl').write_text(''.join(line(name, p) for p in places))


def sources(name, data_dir):
    task = tasks.get(name, 'published_train')
    return {split: list(task.source(split, data_dir)) for split in SPLITS}


def answers(examples):
    return {int(example['answer']) for example in examples}


@pytest.fixture
def no_network(monkeypatch):
    def refused(*_, **__):
        raise OSError('no route to host')

    monkeypatch.setattr(published_files.urllib.request, 'urlopen', refused)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('folder', ['.', 'downloads/manual'])
def test_files_on_disk_become_splits(tmp_path, no_network, name, folder):
    write(tmp_path / folder, name)
    splits = sources(name, tmp_path)
    assert {split: len(examples) for split, examples in splits.items()} == {
        'train': 36,
        'validation': 4,
        'test': 5,
    }
    assert answers(splits['test']) == set(range(40, 45))
    assert answers(splits['train']) | answers(splits['validation']) == set(range(40))
    first = splits['test'][0]
    solution = 'Itself.' if name == 'gsm8k' else r'$\boxed{40}$ it is.'
    expected = {'question': 'What is 40?', 'answer': '40', 'solution': solution, 'index': 0}
    assert first == expected
    assert [example['index'] for example in splits['train']] == list(range(36))


def test_validation_is_the_same_whatever_the_order_of_the_file(tmp_path, no_network):
    write(tmp_path / 'a', 'gsm8k')
    write(tmp_path / 'b', 'gsm8k', train=reversed(range(40)))
    first, second = (answers(sources('gsm8k', tmp_path / f)['validation']) for f in 'ab')
    # The problems are pinned, so that the validation split stays the same for ever.
    assert first == second == {0, 5, 17, 37}


def test_no_test_problem_is_learnt_from_and_none_occurs_twice(tmp_path, no_network):
    write(tmp_path, 'gsm8k', train=[*range(40), *range(20)], test=range(30, 35))
    with (tmp_path / 'gsm8k_train.jsonl').open('a') as file:
        file.write(json.dumps({'question': 'What  is\n34?', 'answer': '#### 34'}))
    splits = sources('gsm8k', tmp_path)
    learnt = [*splits['train'], *splits['validation']]
    assert answers(learnt) == {*range(30), *range(35, 40)} and len(learnt) == 35


@pytest.mark.parametrize('name', NAMES)
def test_no_files_and_no_network_is_one_line(tmp_path, no_network, name):
    with pytest.raises(ValueError) as error:
        sources(name, tmp_path)
    message = str(error.value)
    assert message.startswith(f'{tmp_path / f"{name}_train.jsonl"} is not there and cannot be ')
    assert f'put {name}_train.jsonl and {name}_test.jsonl, from https://' in message
    assert message.endswith(f', into {tmp_path}') and '\n' not in message
    # Doing what the message says helps.
    write(tmp_path, name)
    assert len(sources(name, tmp_path)['test']) == 5


def test_files_are_fetched_once(tmp_path, monkeypatch):
    write(tmp_path / 'server', 'gsm8k')
    builder = tasks.get('gsm8k', 'published_train').builder()
    urls = {
        split: (tmp_path / 'server' / f'gsm8k_{split}.jsonl').as_uri()
        for split in ('train', 'test')
    }
    monkeypatch.setattr(builder, 'URLS', urls)
    assert len(sources('gsm8k', tmp_path / 'data')['test']) == 5
    fetched = sorted(path.name for path in (tmp_path / 'data').glob('*.*'))
    assert fetched == ['gsm8k_test.jsonl', 'gsm8k_train.jsonl']
    monkeypatch.setattr(builder, 'URLS', dict.fromkeys(urls, 'file:///nowhere'))
    assert len(sources('gsm8k', tmp_path / 'data')['train']) == 36


def test_files_come_from_their_authors(tmp_path):
    for name, root in (
        ('gsm8k', 'https://raw.githubusercontent.com/openai/grade-school-math/'),
        ('math500', 'https://github.com/openai/prm800k/'),
    ):
        urls = tasks.get(name, 'published_train').builder().URLS
        assert list(urls) == ['train', 'test']
        assert all(re.fullmatch(rf'{root}.*/{split}\.jsonl', url) for split, url in urls.items())


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('nonsense', "gsm8k_train.jsonl:1: found 'nonsense', expected JSON; mend that file"),
        ('', 'gsm8k_train.jsonl: the file is empty'),
        (line('gsm8k', 1), 'gsm8k_train.jsonl: 1 problems, expected 10 or more'),
    ],
)
def test_a_wrong_file_is_named_with_its_remedy(tmp_path, no_network, text, message):
    write(tmp_path, 'gsm8k')
    (tmp_path / 'gsm8k_train.jsonl').write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sources('gsm8k', tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('suffix', ['.json', '.csv'])
def test_files_of_other_forms_with_own_keys(tmp_path, no_network, suffix):
    """Problems that are read by other keys are made anew, and the old ones stay."""
    for split, places in (('train', range(40)), ('test', range(40, 45))):
        records = [{'q': f'What is {n}?', 'label': n, 'other': n + 100} for n in places]
        rows = [','.join(records[0]), *(','.join(map(str, r.values())) for r in records)]
        text = json.dumps(records) if suffix == '.json' else '\n'.join(rows)
        (tmp_path / f'gsm8k_{split}{suffix}').write_text(text)

    def learnt(fields):
        task = tasks.get('gsm8k', 'published_train', fields=fields)
        return {split: answers(task.source(split, tmp_path)) for split in SPLITS}

    first = learnt('question:q,answer:label')
    assert first['test'] == set(range(40, 45)) and len(first['train']) == 36
    assert learnt('question:q,answer:other')['test'] == set(range(140, 145))
    assert learnt('question:q,answer:label') == first
    with pytest.raises(ValueError, match=rf'gsm8k_train\{suffix}:?.*mend that file, or move it'):
        learnt('')


@pytest.mark.parametrize('name', NAMES)
def test_problems_are_made_anew_when_their_files_change(tmp_path, no_network, name):
    """F52, F53 and F55: both files replaced, and one answer mended."""
    write(tmp_path, name)
    sources(name, tmp_path)
    write(tmp_path, name, train=range(100, 140), test=range(140, 145))
    splits = sources(name, tmp_path)
    assert answers(splits['test']) == set(range(140, 145))
    assert answers(splits['train']) | answers(splits['validation']) == set(range(100, 140))
    test = tmp_path / f'{name}_test.jsonl'
    test.write_text(test.read_text().replace('140', '999'))
    assert 999 in answers(sources(name, tmp_path)['test'])


def test_problems_whose_files_are_gone_are_refused(tmp_path, no_network):
    """F54."""
    write(tmp_path, 'gsm8k')
    sources('gsm8k', tmp_path)
    for file in tmp_path.glob('*.jsonl'):
        file.unlink()
    with pytest.raises(ValueError, match='gsm8k_test.jsonl.* is gone; put it back, or') as error:
        sources('gsm8k', tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_problems_of_which_one_file_is_gone_are_refused_and_stay(tmp_path, no_network, split):
    """Otherwise they would be made of one file of the user and one that is downloaded."""
    write(tmp_path, 'gsm8k')
    expected = sources('gsm8k', tmp_path)
    file = tmp_path / f'gsm8k_{split}.jsonl'
    content = file.read_text()
    file.unlink()
    with pytest.raises(ValueError, match=f'gsm8k_{split}.jsonl, which .* is gone; put it back, or'):
        sources('gsm8k', tmp_path)
    # The split may have a file of another form.
    file.with_suffix('.json').write_text(json.dumps([json.loads(x) for x in content.splitlines()]))
    assert sources('gsm8k', tmp_path) == expected


def test_problems_that_nobody_knows_the_files_of_are_made_anew(tmp_path, no_network):
    """Problems from before there were files of digests."""
    write(tmp_path, 'gsm8k')
    sources('gsm8k', tmp_path)
    (origin,) = tmp_path.glob(f'gsm8k/*{ORIGIN}')
    origin.unlink()
    write(tmp_path, 'gsm8k', test=range(140, 145))
    assert answers(sources('gsm8k', tmp_path)['test']) == set(range(140, 145))
    assert origin.is_file()


@pytest.mark.parametrize('text', ['{', '[]', '{"gsm8k_test.jsonl": 5}'])
def test_a_damaged_file_of_digests_is_named(tmp_path, no_network, text):
    write(tmp_path, 'gsm8k')
    sources('gsm8k', tmp_path)
    (origin,) = tmp_path.glob(f'gsm8k/*{ORIGIN}')
    origin.write_text(text)
    with pytest.raises(ValueError, match='move it away and run again') as error:
        sources('gsm8k', tmp_path)
    assert str(error.value).startswith(str(origin)) and '\n' not in str(error.value)
    origin.unlink()
    assert len(sources('gsm8k', tmp_path)['test']) == 5
