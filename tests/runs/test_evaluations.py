"""What an evaluation leaves on disk, and the same figures from it by `spg_jax.score`.

The model is left out: the completions are recorded ones, whose verdicts their files hold.
"""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import countdown, gsm8k, math500, sudoku
from spg_jax import evaluate, score
from spg_jax.assembly import assemble
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.rl.evaluator import Evaluator, _Completions
from spg_jax.runs import evaluations
from spg_jax.runs.evaluations import card_of, write_evaluation
from spg_jax.tasks import card as cards

pytestmark = pytest.mark.fast

CASES = Path(__file__).parents[1] / 'tasks'
MODEL = SimpleNamespace(
    autoregressive=False, visible_block=0, shift_logits=False, experts=0, family='llada'
)
CONFIGS = {
    'countdown': lambda: countdown.get_config('tiny'),
    'sudoku': lambda: sudoku.get_config('tiny'),
    'gsm8k': gsm8k.get_config,
    'math500': math500.get_config,
}


class Texts:
    """A tokenizer whose tokens are whole texts; 0 ends a completion."""

    eos_id = 0

    def __init__(self, texts):
        self.texts = texts

    def decode(self, ids, keep_specials=False):
        (place,) = ids[:1]
        return self.texts[place - 1]


def evaluated(name, folder, **settings):
    """An evaluation of recorded completions; returns (figures, card, recorded cases)."""
    config = CONFIGS[name]()
    for key, value in settings.items():
        config.task[key] = value
    config.evaluation.update(lengths=(32, 64), steps=(16, 32), block_length=16, samples=2)
    config.sampling.update(length=64, steps=32, block_length=16)
    task = assemble(config).evaluation_task
    cases = [json.loads(line) for line in (CASES / f'{name}_completions.jsonl').open()]
    examples = [
        task.read_record(case['question'], case['ground_truth']) | {'index': index}
        for index, case in enumerate(cases)
    ]
    texts = [case['completion'] for case in cases]
    evaluator = Evaluator(
        SimpleNamespace(config=MODEL), task, Texts(texts), assemble(config).evaluation, None
    )

    def generate(variables, examples, decoding, samples):
        """The recorded completions; those of another length than the headline are shifted by one,
        and so are wrong."""
        places = np.repeat(np.arange(len(examples)), samples)
        places = (places + (decoding.length == 32)) % len(examples) + 1
        tokens = places[:, None].astype(np.int32)
        return _Completions(len(places), np.arange(len(places)), tokens, tokens, None)

    evaluator._generate = generate
    transcripts = []
    figures = evaluator.report({}, examples, transcripts)
    card = write_evaluation(folder, config, examples, transcripts, 'validation', figures)
    return figures, card, cases


@pytest.mark.parametrize(
    ('name', 'settings'),
    [
        ('countdown', {}),
        ('countdown', {'format': 'published_train'}),
        ('countdown', {'rules': 'mended'}),
        ('sudoku', {}),
        ('sudoku', {'format': 'published_train', 'shots': 3}),
        ('gsm8k', {}),
        ('math500', {'rules': 'mended'}),
    ],
    ids=str,
)
def test_the_completions_of_an_evaluation_give_its_figures_again(tmp_path, name, settings):
    figures, card, cases = evaluated(name, tmp_path, **settings)
    again = score.score(None, [str(tmp_path)])
    for key in ('task', 'accuracy', 'correct', 'total', 'scorer'):
        assert again[key] == figures[key], key
    assert again.get('grid_accuracy') == figures.get('grid_accuracy')
    assert again['card'] == card.to_json()
    if figures['scorer'] == 'published':  # whose verdicts are recorded
        verdicts = [case['score'] for case in cases]
        right = sum(each if isinstance(each, bool) else each[0] for each in verdicts)
        assert figures['correct'] == right > 0
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['card'] == card.to_json() and result['accuracy'] == figures['accuracy']


def test_every_length_and_the_samples_of_pass_at_k_have_a_file_and_a_card(tmp_path):
    figures, card, cases = evaluated('countdown', tmp_path)
    result = json.loads((tmp_path / 'result.json').read_text())
    expected = {
        'completions.jsonl': (64, 32, 0.0, 1),
        'completions_32_16.jsonl': (32, 16, 0.0, 1),
        'completions_pass_at_2.jsonl': (64, 32, 1.0, 2),
    }
    assert set(result['cards']) == set(expected)
    for file, (length, steps, temperature, samples) in expected.items():
        file_card = cards.card_beside(tmp_path / file)
        assert (file_card.length, file_card.steps, file_card.samples) == (length, steps, samples)
        assert file_card.temperature == temperature and file_card.block == 16
        assert len((tmp_path / file).read_text().splitlines()) == samples * len(cases)
        accuracy = score.score(None, [str(tmp_path / file)])['accuracy']
        if temperature == 0:
            assert accuracy == figures['accuracy_by_length'][str(length)]
    assert (card.task, card.shots, card.count) == ('countdown', 0, len(cases))
    assert (card.scorer, card.sampler) == ('compact', 'low_confidence')


def test_unlike_evaluations_share_no_column(tmp_path):
    zero, three = tmp_path / 'zero', tmp_path / 'three'
    evaluated('sudoku', zero, format='published_train', shots=0)
    evaluated('sudoku', three, format='published_train', shots=3)
    with pytest.raises(ValueError, match='may not stand in one column.*: prompt .*, shots 0 and 3'):
        score.score(None, [str(zero), str(three)])
    result = score.score(None, [str(zero), str(three)], apart=True)
    assert [column['files'] for column in result['columns']] == [[str(zero)], [str(three)]]
    mended = score.score(None, [str(zero)], rules='mended')
    scorer = {'scorer': 'mended', 'version': cards.VERSIONS['mended']}
    assert mended['card'] == result['columns'][0]['card'] | scorer


def test_like_evaluations_have_a_row_each(tmp_path, capsys):
    folders = [tmp_path / 'first', tmp_path / 'second']
    for folder in folders:
        figures, *_ = evaluated('countdown', folder)
    result = score.score('countdown', list(map(str, folders)))
    assert [row['accuracy'] for row in result['rows']] == [figures['accuracy']] * 2
    assert (result['accuracy'], result['total']) == (figures['accuracy'], 2 * figures['total'])
    score.show(result)
    assert re.search(f'{figures["accuracy"]:.3f}', capsys.readouterr().err)


def test_completions_without_a_card_are_no_match_for_those_with_one(tmp_path):
    evaluated('countdown', tmp_path)
    other = str(CASES / 'countdown_completions.jsonl')
    with pytest.raises(ValueError, match='has no card, which .* has'):
        score.score('countdown', [str(tmp_path), other])
    result = score.score('countdown', [str(tmp_path), other], apart=True)
    assert [column['card'] is None for column in result['columns']] == [False, True]
    assert score.score('countdown', [other])['card'] is None
    with pytest.raises(ValueError, match='has no card, which would name its task; add --task'):
        score.score(None, [other])
    with pytest.raises(ValueError, match='of task countdown by its card, found --task=sudoku'):
        score.score('sudoku', [str(tmp_path)])
    with pytest.raises(ValueError, match='has a card.*, found --fields; leave ') as error:
        score.score(None, [str(tmp_path)], fields='completion:x')
    assert '\n' not in str(error.value)


def test_completions_that_were_changed_are_refused(tmp_path):
    evaluated('countdown', tmp_path)
    path = tmp_path / 'completions.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[:-1]))
    with pytest.raises(ValueError, match=f'found {len(lines) - 1} completions, expected'):
        score.score(None, [str(tmp_path)])
    changed = json.loads(lines[-1]) | {'ground_truth': [[1, 2], 3]}
    path.write_text(''.join(lines[:-1]) + json.dumps(changed))
    with pytest.raises(ValueError, match='its problems are not those of its card'):
        score.score(None, [str(tmp_path)])


def test_settings_that_change_completions_are_on_the_card():
    config = countdown.get_config('tiny')
    problem = {'numbers': [1, 2, 3], 'target': 6, 'index': 0}

    def sampler(**settings):
        config = countdown.get_config('tiny')
        for key, value in settings.items():
            group, name = key.split('__')
            config[group][name] = value
        return card_of(config, [problem], 'none').sampler

    assert sampler() == sampler(sampling__threshold=0.5) == 'low_confidence'
    assert sampler(evaluation__sampler='threshold') == 'threshold, threshold 0.9'
    assert sampler(sampling__guidance=1.5) == 'low_confidence, guidance 1.5'
    edited = sampler(evaluation__sampler='autoedit', sampling__edit_rounds=2)
    assert edited == 'autoedit, commit low_confidence, edit_threshold 0.9, edit_rounds 2, ' + (
        'keep_threshold 0.5'
    )
    assert card_of(config, [problem], 'none').checkpoint == 'none'
    # A setting of samplers is a field of cards, or on the list that `_sampler` reads, or does not
    # change the text of a completion.
    fields = {'length', 'steps', 'block_length', 'temperature', 'sampler'}
    without_part = {'stop_early', 'records', 'influence_window'}
    names = {field.name for field in dataclasses.fields(SamplingConfig)}
    assert names == fields | without_part | set(evaluations._SETTINGS)


def test_results_never_take_the_place_of_a_run(tmp_path):
    evaluate.check_out(tmp_path / 'new')
    assert (tmp_path / 'new').is_dir()
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match='holds a run or a policy'):
        evaluate.check_out(tmp_path / 'run')
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='file/out cannot be made .*; give --out'):
        evaluate.check_out(tmp_path / 'file' / 'out')
