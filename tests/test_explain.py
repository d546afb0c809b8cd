"""`--explain`: every setting, its value, its meaning and where the value comes from."""

import re

import pytest

from spg_jax.explain import explain, meanings_of, print_explanation
from spg_jax.process.config_flag import Sources
from tests.flags import parse_config

pytestmark = pytest.mark.fast


def test_every_value_says_where_it_comes_from(monkeypatch):
    config, sources = parse_config(
        monkeypatch,
        '--config=sudoku:tiny',
        '--config.rl.recipe=published',
        '--config.rl.omega=0.5',
        '--config.evaluation.lengths=(20,)',
    )
    rows = {row.key: row for row in explain(config, sources)}
    assert rows['spg.omega'][1:3] == ('0.5', 'command line')  # though it is the default
    assert rows['evaluation.lengths'].source == 'command line'
    assert rows['spg.beta'][1:3] == ('1.0', 'preset')
    assert rows['rl.group_size'][1:3] == ('6', 'recipe')
    assert rows['optimizer.b1'][1:3] == ('0.9', 'default [A]')
    assert rows['base.checkpoint'][1:3] == ("''", 'default')
    assert rows['rl.group_size'].meaning == 'G, the number of completions of each prompt'
    assert rows['spg.bound'].meaning == 'which upper bound (EUBO) is used: plain, strict or loose'
    assert len(rows) == sum(map(len, config.values())) - len(config.spg)  # which rl has as well


def test_a_page_that_is_piped_has_one_line_a_setting(monkeypatch, capsys):
    arguments = ['--config=countdown:tiny', '--config.rl.objective=d1', '--config.d1.epsilon=0.2']
    print_explanation(*parse_config(monkeypatch, *arguments))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('countdown:tiny, recipe ours; ')
    (epsilon,) = (line for line in lines if line.startswith('d1.epsilon'))
    assert re.fullmatch(
        r'd1\.epsilon +0\.2 +command line +ratios are clipped to 1 - epsilon and 1 \+ epsilon',
        epsilon,
    )
    assert all(line == line.rstrip() for line in lines)
    settings = [line for line in lines[3:] if line]
    assert all(re.match(r'\w+\.\w+ +\S', line) for line in settings)
    config, _ = parse_config(monkeypatch, *arguments)
    assert len(settings) == sum(map(len, config.values()))


def test_meanings_are_read_from_comments_and_settings():
    meanings = meanings_of('d1')
    assert meanings['train.seed'] == 'the seed of order of prompts, sampling and corruption'
    assert meanings['d1.kl'].startswith('weight of the k3 estimate')


def test_what_does_not_exist_is_refused_and_not_explained(monkeypatch):
    config, _ = parse_config(monkeypatch, '--config=countdown:tiny')
    with config.unlocked():
        config.rl.grup_size = 6
    with pytest.raises(ValueError, match='no setting rl.grup_size; use rl.group_size'):
        print_explanation(config, Sources('x', frozenset(), frozenset()))
