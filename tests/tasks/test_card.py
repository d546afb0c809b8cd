"""Protocol cards: which figures may stand in one column, and what a card is made of."""

import dataclasses
import json
from pathlib import Path

import pytest

from spg_jax import score, tasks
from spg_jax.tasks import card as cards
from spg_jax.tasks import judge
from spg_jax.tasks.card import Card
from spg_jax.tasks.task import RULES

pytestmark = pytest.mark.fast

HERE = Path(__file__).parent
CARD = Card(
    task='sudoku',
    prompt='published_eval 0123456789ab',
    shots=3,
    length=256,
    steps=128,
    block=32,
    temperature=0.0,
    sampler='low_confidence',
    samples=1,
    problems='ba9876543210',
    count=256,
    scorer='published',
    version='1',
    checkpoint='validation',
)
OTHERS = {
    'task': 'countdown',
    'prompt': 'compact 0123456789ab',
    'shots': 0,
    'length': 512,
    'steps': 256,
    'block': 64,
    'temperature': 0.9,
    'sampler': 'random',
    'samples': 8,
    'problems': '000000000000',
    'count': 255,
    'scorer': 'mended',
    'version': '2',
    'checkpoint': 'test',
}


def test_every_field_makes_cards_unlike():
    assert set(OTHERS) == set(cards.FIELDS)
    for field, value in OTHERS.items():
        other = dataclasses.replace(CARD, **{field: value})
        assert cards.unlike([CARD, CARD, other]) == [field]
    assert cards.unlike([CARD, Card(**OTHERS)]) == list(OTHERS)
    assert cards.unlike([CARD, dataclasses.replace(CARD)]) == cards.unlike([]) == []


def test_what_is_not_stated_differs_from_every_value_and_not_from_itself():
    unstated = dataclasses.replace(CARD, shots=None)
    assert cards.unlike([CARD, unstated]) == ['shots']
    assert cards.unlike([unstated, dataclasses.replace(unstated)]) == []


def test_a_policy_that_nobody_chose_stands_beside_those_chosen_on_validation_only():
    unchosen, by_test = (dataclasses.replace(CARD, checkpoint=rule) for rule in ('none', 'test'))
    assert cards.unlike([CARD, unchosen]) == []
    assert cards.unlike([unchosen, by_test]) == ['checkpoint']


def test_unlike_cards_are_refused_in_one_line_that_names_the_fields():
    zero_shot = dataclasses.replace(CARD, shots=0, length=512)
    cards.check_alike({'a': CARD, 'b': dataclasses.replace(CARD)}, 'do this')
    cards.check_alike({'a': None, 'b': None}, 'do this')
    with pytest.raises(ValueError) as error:
        cards.check_alike({'a': CARD, 'b': CARD, 'c': zero_shot}, 'do this')
    assert str(error.value) == (
        'a and c may not stand in one column, because their cards differ: shots 3 and 0, '
        'length 256 and 512; do this'
    )
    with pytest.raises(ValueError, match='^b has no card, which a has, so that nothing says'):
        cards.check_alike({'a': CARD, 'b': None}, 'do this')


def test_columns_hold_like_cards():
    zero_shot = dataclasses.replace(CARD, shots=0)
    unchosen = dataclasses.replace(CARD, checkpoint='none')
    assert cards.columns([unchosen, zero_shot, CARD, unchosen]) == [CARD, zero_shot]
    assert cards.headings([CARD, zero_shot]) == ['shots 3', 'shots 0']


def test_a_card_comes_back_from_json():
    for card in (CARD, Card('gsm8k'), dataclasses.replace(CARD, length='best')):
        assert cards.from_json(json.loads(json.dumps(card.to_json())), 'file') == card


@pytest.mark.parametrize(
    ('field', 'value'),
    [('length', 0), ('length', 'long'), ('shots', -1), ('temperature', 'x'), ('task', None)],
)
def test_a_damaged_card_is_one_line(tmp_path, field, value):
    contents = {'cards': {'completions.jsonl': CARD.to_json() | {field: value}}}
    (tmp_path / 'result.json').write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=f'result.json, cards.completions.jsonl: {field} is') as e:
        cards.card_beside(tmp_path / 'completions.jsonl')
    assert '\n' not in str(e.value)


def test_a_file_without_a_card_has_none(tmp_path):
    path = tmp_path / 'completions.jsonl'
    assert cards.card_beside(path) is None
    for text in ('[]', '{}', '{"cards": 5}', '{"cards": {"other.jsonl": {}}}'):
        (tmp_path / 'result.json').write_text(text)  # of another program
        assert cards.card_beside(path) is None


def cases(name):
    return [json.loads(line) for line in (HERE / f'{name}_completions.jsonl').open()]


@pytest.mark.parametrize('name', tasks.TASKS)
def test_a_problem_comes_back_from_its_record(name):
    task = tasks.get(name, 'published_eval')
    for case in cases(name):
        example = task.read_record(case['question'], case['ground_truth'])
        question, ground_truth = json.loads(json.dumps(task.to_record(example)))
        assert task.read_record(question, ground_truth) == example


def test_problems_and_wordings_are_told_apart_and_their_order_is_not():
    task = tasks.get('countdown')
    first, second = (
        {'numbers': [1, 2, 3], 'target': 6, 'index': 0},
        {'numbers': [1, 2, 3], 'target': 5, 'index': 1},
    )
    digest = cards.problems_digest(task, [first, second])
    assert cards.problems_digest(task, [second, first, second | {'index': 9}]) == digest
    assert cards.problems_digest(task, [first]) != digest
    sudokus = [tasks.get('sudoku', 'published_eval', shots=shots) for shots in (0, 0, 3)]
    wordings = [cards.wording(task) for task in sudokus]
    assert wordings[0] == wordings[1] != wordings[2]


# The verdicts by which a version of a scorer is known. Whoever changes a rule, so that these no
# longer hold, raises the version in spg_jax/tasks/card.py and writes down the new verdicts here.
VERDICTS = {
    ('countdown', 'compact', 'released'): ('1', '9e1b70317e61'),
    ('countdown', 'published_eval', 'released'): ('1', '1f3f87105f78'),
    ('countdown', 'published_eval', 'mended'): ('3', '489e73ab8a29'),
    ('gsm8k', 'published_eval', 'released'): ('1', '28a4e0b3fd85'),
    ('gsm8k', 'published_eval', 'mended'): ('3', '8f7f3fb25205'),
    ('math500', 'published_eval', 'released'): ('1', 'f5b027996592'),
    ('math500', 'published_eval', 'mended'): ('3', '7881804c896f'),
    ('sudoku', 'compact', 'released'): ('1', 'e018a8bba654'),
    ('sudoku', 'published_eval', 'released'): ('1', 'b1fee49be7ea'),
    ('sudoku', 'published_eval', 'mended'): ('3', '6f7b483f799c'),
}


def verdicts_digest(name, format, rules):
    """The version of a scorer, and a digest of its verdicts on all recorded completions."""
    task = tasks.get(name, format, rules=rules)
    scores = [score.judge(task, case, name) for case in cases(name)]
    return cards.scorer_version(task), cards._digest(scores)


@pytest.mark.parametrize('scorer', VERDICTS, ids='-'.join)
def test_a_version_of_a_scorer_is_held_to_its_verdicts(scorer):
    assert verdicts_digest(*scorer) == VERDICTS[scorer]


def test_every_scorer_of_the_package_has_a_version_that_is_held():
    held = {
        tasks.get(name, format, rules=rules).scorer: version
        for (name, format, rules), (version, _) in VERDICTS.items()
    }
    assert held | {judge.NAME: cards.VERSIONS[judge.NAME]} == cards.VERSIONS
    assert {rules for _, _, rules in VERDICTS} == set(RULES)
