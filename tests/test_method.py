"""Settings that depend on the objective: its group, SPG's two names, recipes, and the flags."""

import re

import pytest

from configs import countdown, sudoku
from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.limits import _alike
from spg_jax.method import FAST, complete, names, set_objective, use_recipe
from spg_jax.process.config_flag import UnusableConfig, assigned
from spg_jax.rl.objectives import REGISTRY
from spg_jax.runs.directory import default_workdir
from tests.flags import parse_config

pytestmark = pytest.mark.fast
TINY = '--config=countdown:tiny'


# --- the group of an objective --------------------------------------------------------------------


@pytest.mark.parametrize('name', REGISTRY)
def test_every_objective_assembles_with_its_own_group_alone(name):
    config = default_config(name)
    assert set(REGISTRY) & set(config) == {name}
    assert ('beta' in config.rl) == (name == 'spg')
    if name == 'just_grpo':  # it needs its own sampler
        config.sampling.update(commit='left_to_right', steps=config.sampling.length)
    if name == 'autoedit':
        config.sampling.sampler = 'autoedit'
    assert assemble(config).objective.draws >= 1


def test_the_settings_of_spg_have_two_names_and_one_value():
    config = sudoku.get_config('tiny')
    assert config.spg.beta == config.rl.beta == 1.0
    config.rl.beta = 2.0
    assert config.spg.beta == 2.0
    config.spg.negative = 'none'
    assert config.rl.negative == 'none'


def test_two_values_of_one_setting_are_refused():
    copy = type(default_config())(default_config().to_dict())
    copy.rl.beta = 2.0
    with pytest.raises(ValueError, match='rl.beta is 2.0 and spg.beta is 1.5, which are two names'):
        assemble(copy)


def test_a_configuration_of_before_spg_had_a_group_keeps_its_values():
    old = default_config().to_dict()
    del old['spg'], old['rl']['baseline']
    old['rl'] |= {'beta': 1.25, 'negative': 'elbo'}
    config = type(default_config())(old)
    assemble(config)
    assert (config.spg.beta, config.spg.negative) == (1.25, 'elbo')


def test_an_objective_that_is_set_without_its_group_gets_it():
    config = default_config()
    config.rl.objective = 'd1'
    assemble(config)
    assert config.d1.epsilon == REGISTRY['d1'].settings().epsilon
    assert 'spg' not in config and 'beta' not in config.rl


def test_the_directory_of_a_run_does_not_depend_on_other_objectives():
    direct, around = default_config('d1'), sudoku.get_config('tiny')
    around.update(countdown.get_config('small').to_dict())
    direct.update({k: v for k, v in around.to_dict().items() if k not in ('rl', 'spg')})
    direct.rl.update({k: v for k, v in around.rl.items() if k in direct.rl and k != 'objective'})
    for name in ('d1', 'spg', 'd1'):
        set_objective(around, name)
    assert default_workdir(around) == default_workdir(direct)
    around.d1.epsilon = 0.25
    assert default_workdir(around) != default_workdir(direct)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'order', [('--config.rl.objective=d1', '--config.d1.epsilon=0.2')[::step] for step in (1, -1)]
)
def test_settings_of_the_named_objective_can_be_set(monkeypatch, order):
    config, _ = parse_config(monkeypatch, TINY, *order)
    assert (config.rl.objective, config.d1.epsilon) == ('d1', 0.2)
    assert assemble(config).objective.behaviour


def test_flags_of_a_file_count_as_well(monkeypatch, tmp_path):
    (tmp_path / 'flags').write_text('--config.rl.objective=d1\n--config.d1.epsilon=0.2\n')
    config, _ = parse_config(monkeypatch, TINY, f'--flagfile={tmp_path}/flags')
    assert (config.rl.objective, config.d1.epsilon) == ('d1', 0.2)


def test_a_file_may_name_the_objective_and_set_its_settings(monkeypatch, tmp_path):
    (tmp_path / 'own.py').write_text(
        'from spg_jax.config import default_config\n'
        'def get_config():\n'
        "    config = default_config('d1')\n"
        '    config.d1.kl = 0.5\n'
        '    return config\n'
    )
    config, _ = parse_config(monkeypatch, f'--config={tmp_path}/own.py', '--config.d1.epsilon=0.3')
    assert (config.d1.kl, config.d1.epsilon) == (0.5, 0.3)
    config, _ = parse_config(
        monkeypatch, f'--config={tmp_path}/own.py', '--config.rl.objective=spg'
    )
    assert 'd1' not in config and config.rl.beta == 1.5


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['rl.objective=spgg'], "rl.objective is 'spgg': use spg, or another of"),
        (['rl.objective=nowhere.d1'], "rl.objective is 'nowhere.d1': there is no module 'nowhere'"),
        (['rl.recipe=best'], "rl.recipe is 'best'; use one of ours, published"),
        (
            ['d1.epsilon=1'],
            "no setting d1.epsilon: rl.objective is 'spg'; set rl.objective to 'd1'",
        ),
        (['rl.objective=d1', 'd1.epsilonn=1'], 'no setting d1.epsilonn; use d1.epsilon, or see'),
        (
            ['rl.objective=d1', 'rl.negative=none'],
            'no setting rl.negative: it belongs to spg, and ',
        ),
        (['rl.objective=d1', 'spg.beta=1'], "no setting spg.beta: rl.objective is 'd1'"),
        (
            ['spg.betta=1'],
            'no setting spg.betta; use spg.beta, or see spg_jax/rl/objectives/spg.py',
        ),
        (
            ['rl.grup_size=1'],
            'no setting rl.grup_size; use rl.group_size, or see spg_jax/config.py',
        ),
    ],
)
def test_a_flag_that_names_nothing_is_one_line(monkeypatch, arguments, message):
    with pytest.raises(UnusableConfig, match=re.escape(message)) as error:
        parse_config(monkeypatch, TINY, *(f'--config.{argument}' for argument in arguments))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('value', 'message'),
    [(0, 'd1.epsilon is 0'), ('x', 'd1.epsilon is'), (float('nan'), 'use finite numbers')],
)
def test_settings_of_an_objective_are_checked_as_others(value, message):
    config = default_config('d1')
    config = type(config)(config.to_dict())
    with config.ignore_type():
        config.d1.epsilon = value
    if value == 0:
        assemble(config)  # An integer is a number.
        return
    with pytest.raises(ValueError, match=message):
        assemble(config)


def test_assignments_are_read_as_absl_does():
    words = [
        '--config=x',
        '--config.a.b=1',
        '-config.a.c',
        '2',
        '--noconfig.a.d',
        '--config.a.b=3=',
    ]
    assert assigned([*words, '--', '--config.a.e=1']) == {
        'a.b': '3=',
        'a.c': '2',
        'a.d': '--config.a.b=3=',
    }


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', REGISTRY)
def test_recipes_name_settings_that_exist_with_values_of_their_kind(name):
    config = default_config(name)
    for key, value in REGISTRY[name].recipe.items():
        assert key in names(config), key
        group, leaf = key.split('.')
        assert _alike(value, config[group][leaf]), (key, value)


def test_a_recipe_lies_between_the_preset_and_the_command_line(monkeypatch):
    published = '--config.rl.recipe=published'
    plain, _ = parse_config(monkeypatch, TINY)
    config, sources = parse_config(monkeypatch, TINY, published, '--config.corruption.draws=8')
    recipe = REGISTRY['spg'].recipe
    assert plain.rl.group_size == 8 and recipe['rl.group_size'] == 6
    assert config.rl.group_size == 6 and config.optimizer.learning_rate == 3e-6
    assert config.rl.inner_updates == recipe['rl.inner_updates']
    assert config.corruption.draws == 8 and 'corruption.draws' not in sources.completed
    assert config.model.width == plain.model.width  # of which the recipe says nothing
    assemble(config)


def test_pieces_keep_their_number_of_groups_under_another_group_size(monkeypatch):
    """12 rows of 24 are what 16 of 32 were; a microbatch that is given stays as it is."""
    published = '--config.rl.recipe=published'
    config, sources = parse_config(monkeypatch, TINY, published)
    assert (config.rl.microbatch, config.rl.generation_batch) == (12, 0)
    assert 'rl.microbatch' in sources.completed and 'rl.generation_batch' not in sources.completed
    config, _ = parse_config(monkeypatch, TINY, published, '--config.rl.microbatch=24')
    assert config.rl.microbatch == 24
    config, _ = parse_config(monkeypatch, TINY, published, '--config.rl.group_size=8')
    assert (config.rl.group_size, config.rl.microbatch) == (8, 16)


@pytest.mark.parametrize(
    ('recipe', 'message'),
    [
        ({'rl.grup_size': 6}, 'RECIPE of spg: no setting rl.grup_size; use rl.group_size'),
        ({'rl': 6}, 'RECIPE of spg: no setting rl'),
        ({'rl.group_size': 'six'}, "RECIPE of spg: rl.group_size is 'six'; use a value like 6"),
    ],
)
def test_a_recipe_that_cannot_be_applied_is_refused(monkeypatch, recipe, message):
    config = default_config()
    config.rl.recipe = 'published'
    method = REGISTRY['spg']
    monkeypatch.setitem(REGISTRY, 'spg', type(method)(method.settings, method.build, recipe))
    with pytest.raises(ValueError, match=re.escape(message)):
        use_recipe(config)


def test_a_configuration_that_lacks_the_objective_is_left_to_assemble():
    config = type(default_config())({'task': {'name': 'countdown'}})
    assert complete(config, {}) == frozenset()
    with pytest.raises(ValueError, match='is missing; start from default_config'):
        assemble(config)


def test_the_fast_preset_sets_what_the_command_line_leaves_open():
    config = default_config()
    config.sampling.threshold = 0.5
    assigned = {'sampling.preset': 'fast', 'sampling.threshold': '0.5'}
    completed = complete(config, assigned)
    assert completed == {'sampling.sampler', 'sampling.cache'}
    assert config.sampling.sampler == FAST['sampling.sampler']
    assert config.sampling.threshold == 0.5
    sampling = assemble(config).sampling
    assert sampling.approximate and 'log_prob' in sampling.records  # so that the gap is logged
    with pytest.raises(ValueError, match="sampling.preset is 'slow'; use one of"):
        complete(default_config(), {'sampling.preset': 'slow'})
