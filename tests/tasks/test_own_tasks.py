"""Tasks in files of the user: named by a dotted path, cut into splits, part of a run's identity."""

import hashlib
import json
import math
import random
import re
import sys
from types import SimpleNamespace

import pytest

from configs import countdown
from spg_jax import score, tasks
from spg_jax.assembly import assemble, check_base
from spg_jax.pretrain import base_directory, made_of
from spg_jax.rl.collection import check_rewards
from spg_jax.rl.evaluator import Transcript, check_scores
from spg_jax.runs.claim import claimed
from spg_jax.runs.directory import identity
from spg_jax.runs.evaluations import card_of, write_evaluation

pytestmark = pytest.mark.fast

ECHO = """
from spg_jax.tasks import Score, Task

class Echo(Task):
    problems = 'words.jsonl'

    def prompt(self, example):
        return example['word']

    def reward(self, completion, example):
        return float(completion == example['word'])

    def score(self, completion, example):
        return Score(int(completion == example['word']), 1, completion == example['word'])
"""
TEACHING = """
    vocabulary = tuple('abcdefghij')

    def right_answer(self, example):
        return example['word']
"""
WORDS = [{'word': f'{first} {second}'} for first in 'abcdefghij' for second in 'abcdefghij']


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes my_package/NAME.py and its problems into the current directory, and forgets them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
    folder = tmp_path / 'my_package'
    folder.mkdir()

    def write_task(source, name='my_task', problems=WORDS):
        (folder / f'{name}.py').write_text(source)
        (folder / 'words.jsonl').write_text('\n'.join(map(json.dumps, problems)))
        return f'my_package.{name}'

    yield write_task
    for name in [name for name in sys.modules if name.partition('.')[0] == 'my_package']:
        del sys.modules[name]


def config_of(name):
    config = countdown.get_config('tiny')
    config.task.name = name
    return config


def test_a_module_in_the_current_directory_is_found(write, tmp_path):
    (tmp_path / 'echo_alone.py').write_text(ECHO)
    try:
        assert tasks.get('echo_alone').name == 'echo_alone'
    finally:
        sys.modules.pop('echo_alone', None)
    assert tasks.get(write(ECHO)).source('train', '')[0]['index'] == 0


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('', 'my_task.py defines no task; expected one class derived from spg_jax.tasks.Task'),
        (ECHO + '\nclass Second(Task): pass', 'my_task.py defines the tasks Echo and Second; expe'),
        (
            ECHO.replace('def reward', 'def rewards'),
            'class Echo in .*my_task.py has no reward; a t',
        ),
        (ECHO.replace("problems = 'words.jsonl'", 'pass'), 'my_task.py has no problems; a task ne'),
        (
            'from spg_jax.tasks import Task\nclass Bare(Task): pass',
            'has no prompt and no reward and no score and no problems; a task needs',
        ),
        ('x = 1\nx = (', r'cannot be imported: .*my_task.py:2: '),
        ('x = 1\n\nx = y', r"cannot be imported: .*my_task.py:3: NameError: name 'y' is not def"),
        ('import nowhere_at_all', r'my_task.py:1: ModuleNotFoundError: No module named .nowhere'),
    ],
)
def test_a_module_that_is_no_task_is_refused(write, source, message):
    with pytest.raises(ValueError, match=message) as error:
        assemble(config_of(write(source)))
    assert '\n' not in str(error.value) and 'my_package.my_task' in str(error.value)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('countdwn', "task is 'countdwn', perhaps countdown; use one of countdown, gsm8k,"),
        ('chess', "task is 'chess'; use one of .*, or the dotted path of a module with a task"),
        ('my_package.absent', 'but there is no module my_package.absent; start in the directory'),
        ('absent.task', 'but there is no module absent; start in the directory that holds it'),
        ('my_package/my_task.py', 'a file; use the dotted path of the module, my_package.my_task'),
        ('..my_task', "task is '..my_task'; use one of"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(write, name, message):
    write(ECHO)
    with pytest.raises(ValueError, match=message) as error:
        assemble(config_of(name))
    assert '\n' not in str(error.value)


def test_a_class_that_others_derive_from_is_not_the_task(write):
    source = f'{ECHO}\nclass Louder(Echo):\n    vocabulary = ("a",)\nSame = Louder'
    assert type(tasks.get(write(source))).__name__ == 'Louder'


def test_a_task_of_the_package_with_another_reward(write, tmp_path):
    source = """
from spg_jax.tasks.countdown import Countdown

class Short(Countdown):
    def reward(self, completion, example):
        return super().reward(completion, example) - len(completion) / 1000
"""
    config = config_of(write(source))
    parts, released = assemble(config), tasks.get('countdown')
    check_base(config, parts)
    example = {'numbers': [30, 100, 93], 'target': 23, 'index': 0}
    assert parts.task.prompt(example) == released.prompt(example)
    answer = '<answer> 93 + 30 - 100 </answer>'
    assert parts.task.reward(answer, example) == pytest.approx(1 - len(answer) / 1000)
    assert list(identity(config)['files']) == ['my_task.py of task.name']


@pytest.mark.parametrize(
    ('source', 'shares', 'message'),
    [
        (ECHO, (1.0,), 'my_task has no vocabulary, .*; set base.checkpoint, or'),
        (ECHO + TEACHING, (1.0, 0.5), 'my_task has no shortcut_answer, .*; define it, or set base'),
        (
            ECHO + "    vocabulary = ('a',)",
            (1.0,),
            'my_task has no right_answer, so that it cannot',
        ),
        (ECHO + TEACHING, (1.0,), None),
        (ECHO + "    vocabulary = ('a',)\n    def demonstration(*_): return 'a'", (0.5,), None),
    ],
)
def test_a_base_policy_needs_words_and_answers(write, source, shares, message):
    config = config_of(write(source))
    config.base.stages = tuple((10, share) for share in shares)
    parts = assemble(config)
    if not message:
        return check_base(config, parts)
    with pytest.raises(ValueError, match=message) as error:
        check_base(config, parts)
    assert '\n' not in str(error.value)
    config.base.checkpoint = 'somewhere'
    if 'vocabulary' in message:
        check_base(config, parts, demonstrator=False)


@pytest.mark.parametrize(
    ('key', 'value'),
    [('prompt_template', 'a.txt'), ('shots', 1), ('rules', 'mended'), ('fields', 'question:q')],
)
def test_settings_for_parts_that_an_own_task_does_not_have(write, key, value):
    config = config_of(write(ECHO))
    config.task[key] = value
    with pytest.raises(ValueError, match=f'task.{key} is .*, which task my_package.my_task has no'):
        assemble(config)


def test_an_own_task_works_in_every_format_that_presets_ask_for(write):
    config = countdown.get_config('llada_8b')
    config.task.name = write(ECHO)
    parts = assemble(config)
    assert (parts.task.format, parts.evaluation_task.format) == (
        'published_train',
        'published_eval',
    )
    assert parts.evaluation_task.prompt({'word': 'a'}) == 'a'


def splits_of(name):
    task = tasks.get(name)
    return {split: list(task.source(split, '')) for split in ('train', 'validation', 'test')}


def words_of(examples):
    return {example['word'] for example in examples}


def test_the_contents_of_a_problem_decide_its_split(write):
    before = splits_of(write(ECHO))
    assert {split: len(part) for split, part in before.items()} == {
        'train': 80,
        'validation': 10,
        'test': 10,
    }
    assert set.union(*map(words_of, before.values())) == words_of(WORDS)
    shuffled = random.Random(1).sample(WORDS, len(WORDS))
    after = splits_of(write(ECHO, problems=[*shuffled, *shuffled[:7]]))  # some are there twice
    assert {split: len(part) for split, part in after.items()} == {
        split: len(part) for split, part in before.items()
    }
    for split, part in before.items():
        assert words_of(part) == words_of(after[split])
        assert [example['index'] for example in after[split]] == list(range(len(part)))
    held_out = words_of(after['validation'] + after['test'])
    in_order = [example['word'] for example in shuffled if example['word'] not in held_out]
    assert [example['word'] for example in after['train']] == in_order
    by_hash = sorted(WORDS, key=lambda each: hashlib.sha256(json.dumps(each).encode()).hexdigest())
    assert words_of(after['test']) == words_of(by_hash[:10])
    assert words_of(after['validation']) == words_of(by_hash[10:20])


def test_splits_that_the_user_has_cut_are_kept(write, tmp_path):
    source = ECHO.replace(
        "problems = 'words.jsonl'",
        "problems = {'train': 'words.jsonl', 'test': [{'word': 'a b'}, {'word': 'new'}]}",
    )
    splits = splits_of(write(source))
    assert words_of(splits['test']) == {'a b', 'new'}
    assert len(splits['validation']) == 9 and len(splits['train']) == 90  # 99 are no test problems
    assert 'a b' not in words_of(splits['train'] + splits['validation'])


@pytest.mark.parametrize(
    ('problems', 'message'),
    [
        ("[{'word': 'a'}] * 100", 'has no problem left for validation among 1 to cut; give 10 or'),
        ("({'word': 'a'} for _ in range(9))", 'problems of task .* are .*generator.*; give a list'),
        ("['a', 'b']", "problem 0 of task my_package.my_task is 'a'; give a dictionary"),
        ("[{'word': {1, 2}}]", 'problem 0 of task .* cannot be written as JSON .TypeError: '),
        ("[{'word': float('nan')}]", 'problem 0 of task .* cannot be written as JSON .ValueError'),
        ("'absent.jsonl'", 'my_package/absent.jsonl: cannot be read'),
        ("{'train': 'words.jsonl', 'dev': []}", "a split of task .* is 'dev'; use one of train, v"),
        ("{'test': 'words.jsonl'}", 'has the splits test and no train; add problems to train on'),
    ],
)
def test_problems_that_cannot_be_used_are_refused(write, problems, message):
    name = write(ECHO.replace("problems = 'words.jsonl'", f'problems = {problems}'))
    with pytest.raises(ValueError, match=message) as error:
        tasks.get(name).source('train', '')
    assert '\n' not in str(error.value)


def test_problems_are_as_they_would_come_from_a_file(write):
    method = "def problems(self): return [{'word': (n, 'x')} for n in range(20)]"
    name = write(ECHO.replace("problems = 'words.jsonl'", method))
    assert isinstance(tasks.get(name).source('train', '')[0]['word'], list)


def test_a_test_file_has_problems_as_the_task_has(write, tmp_path):
    name = write(ECHO)
    (tmp_path / 'more.jsonl').write_text('{"word": "a"}\n\n{"word": "b"}\n')
    expected = [{'word': 'a', 'index': 0}, {'word': 'b', 'index': 1}]
    assert tasks.get(name).read_published(tmp_path / 'more.jsonl') == expected


def test_generations_are_scored_only_by_a_task_that_can_read_them(write, tmp_path):
    record = {'question': 'a', 'ground_truth': 'a', 'completion': 'a'}
    (tmp_path / 'generations.jsonl').write_text(json.dumps(record))
    with pytest.raises(ValueError, match='jsonl:1: task my_package.my_task has no read_record, wh'):
        score.score(write(ECHO), ['generations.jsonl'])
    reader = "    def read_record(self, question, ground_truth): return {'word': ground_truth}"
    figures = score.score(write(ECHO + reader, 'reader'), ['generations.jsonl'])
    assert (figures['task'], figures['accuracy']) == ('my_package.reader', 1)


def test_an_evaluation_is_scored_again_without_read_record(write, tmp_path):
    config = config_of(write(ECHO))
    task = assemble(config).evaluation_task
    examples = list(task.source('test', ''))
    texts = [example['word'] for example in examples[:-1]] + ['another']
    transcript = Transcript(assemble(config).evaluation.headline, 1, texts)
    card = write_evaluation(tmp_path / 'out', config, examples, [transcript], 'none', {})
    figures = score.score(None, [str(tmp_path / 'out')])
    assert (figures['correct'], figures['total']) == (len(examples) - 1, len(examples))
    assert figures['card'] == card.to_json()
    with (tmp_path / 'my_package' / 'my_task.py').open('a') as opened:
        opened.write('\n')
    assert card_of(config, examples, 'none').version != card.version


@pytest.mark.parametrize('file', ['my_task.py', 'words.jsonl'])
def test_the_files_of_a_task_belong_to_the_identity_of_a_run(write, tmp_path, file):
    config = config_of(write(ECHO))
    base = base_directory(config)
    assert base.name.startswith('my_package.my_task-')
    with claimed(tmp_path / 'run', identity(config)):
        (tmp_path / 'run' / 'checkpoints' / '4').mkdir(parents=True)
    with claimed(tmp_path / 'run', identity(config)):
        assert base_directory(config) == base
    with (tmp_path / 'my_package' / file).open('a') as opened:
        opened.write('\n')
    assert base_directory(config) != base
    with pytest.raises(ValueError, match=f'holds a training with another {file} of task.name; use'):
        with claimed(tmp_path / 'run', identity(config)):
            pass


def test_a_task_of_the_package_adds_nothing_to_the_identity():
    config = countdown.get_config('tiny')
    assert identity(config)['files'] == {}
    # Base policies that were trained before there were tasks of the user are still found.
    assert made_of(config, assemble(config).task).keys() == {'task', 'model', 'base', 'sampling'}


def test_a_reward_that_no_update_can_use_is_refused():
    task = SimpleNamespace(name='my_task')
    check_rewards(task, [0.0, -1.5], ['a', 'b'])
    for reward in (math.nan, math.inf, 1e39, None):  # of float32 numbers 1e39 is infinite
        shown = re.escape(str(reward))
        with pytest.raises(ValueError, match=f"reward of task my_task is {shown} .* 'b'; return"):
            check_rewards(task, [0.0, reward], ['a', 'b'])


def test_a_verdict_that_is_no_score_is_refused():
    task = SimpleNamespace(name='my_task')
    check_scores(task, [tasks.Score(1, 1, True)])
    with pytest.raises(ValueError, match='score of task my_task is True; return a spg_jax.tasks.S'):
        check_scores(task, [tasks.Score(1, 1, True), True])
