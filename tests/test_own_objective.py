"""A user's own objective: found by its path, built, differentiated, and kept with the run."""

import importlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from benchmarks import objective_lines
from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.objectives import PARTS, Batch, find, source_file
from spg_jax.rl.rollout import Rollout
from spg_jax.runs.claim import claimed
from spg_jax.runs.directory import default_workdir, identity, run_config
from tests.flags import parse_config

pytestmark = pytest.mark.fast
EXAMPLE = 'examples.own_objective'
TINY = '--config=countdown:tiny'


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module in a directory from which the program runs; returns its dotted path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    before = set(sys.modules)
    source = objective_lines.EXAMPLE.read_text()

    def write(text: str = source, name: str = 'package_of_mine.my_objective') -> str:
        path = tmp_path.joinpath(*name.split('.')).with_suffix('.py')
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()
        for module in set(sys.modules) - before:  # as in another process
            del sys.modules[module]
        return name

    yield write
    for module in set(sys.modules) - before:
        del sys.modules[module]


# --- found, built and differentiated --------------------------------------------------------------


def test_the_example_is_built_by_flags_and_its_gradient_is_that_of_its_equation(monkeypatch):
    config, _ = parse_config(
        monkeypatch,
        TINY,
        f'--config.rl.objective={EXAMPLE}',
        '--config.own_objective.temperature=0.5',
    )
    objective = assemble(config).objective
    M, C, P = objective.draws, config.sampling.length, 3
    rng = np.random.default_rng(0)
    length = np.array([C, 5])
    scored = np.arange(C) < length[:, None]
    masked = rng.random((2, M, C)) < 0.5
    masked[0, 0] = False  # a draw that masks nothing counts nothing
    advantage = np.array([0.25, -0.5], np.float32)
    rows = Rollout(
        prompt=jnp.zeros((2, P), jnp.int32),
        prompt_mask=jnp.ones((2, P), bool),
        completion=jnp.zeros((2, C), jnp.int32),
        scored=jnp.asarray(scored),
        commit_step=jnp.zeros((2, C), jnp.int32),
        reward=jnp.zeros(2),
        advantage=jnp.asarray(advantage),
        example_id=jnp.arange(2, dtype=jnp.uint32),
    )
    whole = np.concatenate([np.zeros((2, M, P), bool), masked], axis=2)
    batch = Batch(rows, Draws(masked=jnp.asarray(whole)), {}, jnp.int32(0))

    def loss(logp):
        result = objective.loss(logp, batch)
        return result.total / result.weight

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(-rng.random((2, M, C)), jnp.float32))
    expected = np.zeros((2, M, C))
    for j in range(2):
        weight = np.exp(advantage[j] / 0.5) * length[j] / M / length.sum()
        for k in range(M):
            scored_and_masked = masked[j, k] & scored[j]
            expected[j, k, scored_and_masked] = -weight / max(scored_and_masked.sum(), 1)
    assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def test_files_are_found_in_the_current_directory(own, monkeypatch):
    monkeypatch.setattr(sys, 'path', [entry for entry in sys.path if entry])
    for name in (own(), own(name='objective_beside')):
        config, _ = parse_config(monkeypatch, TINY, f'--config.rl.objective={name}')
        group = name.split('.')[-1]
        assert config[group].temperature == 0.3
        assert default_workdir(config).name.startswith(f'countdown-{group}-')
        assemble(config)


COMPLETE = objective_lines.EXAMPLE.read_text()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (COMPLETE.replace('RECIPE', 'NOTHING'), 'my_objective.py has no RECIPE, a dict of'),
        (COMPLETE.replace('class Settings', 'class Other'), 'my_objective.py:28: NameError'),
        ('RECIPE = {}\nSettings = int\nbuild = 1\n', 'Settings is no dataclass; use a dataclass'),
        (COMPLETE + 'build = 5\n', 'build is no function; use a function (settings, protocol)'),
        (COMPLETE + 'RECIPE = 5\n', 'RECIPE is no dict; use a dict'),
        (
            COMPLETE.replace('def build', 'def make'),
            'has no build, a function (settings, protocol)',
        ),
        (
            re.sub(r'temperature: float = .*', 'temperature: float', COMPLETE),
            'Settings.temperature has no default value',
        ),
        (
            re.sub(r'temperature: float = .*', 'temperature: float = None', COMPLETE),
            'Settings.temperature is None; use text, a bool, a number or a tuple',
        ),
        ('import nothing_like_it\n', "my_objective.py:1: ModuleNotFoundError: No module named 'no"),
        ('\nx = 1 / 0\n', 'my_objective.py:2: ZeroDivisionError: division by zero'),
        ('\n\ndef build(:\n', 'my_objective.py:3: invalid syntax'),
    ],
)
def test_a_file_that_is_not_whole_is_one_line_that_says_what_is_missing(own, text, message):
    name = own(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        default_config(name)
    assert str(error.value).startswith(f'rl.objective is {name!r}: ')
    assert '\n' not in str(error.value)


def test_each_part_is_asked_for(own):
    for part in PARTS:
        text = '\n'.join(f'{other} = None' for other in PARTS if other != part)
        with pytest.raises(ValueError, match=f'my_objective.py has no {part}, '):
            find(own(text))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('package_of_mine.my_objectiv', "there is no module 'package_of_mine.my_objectiv'"),
        ('pakkage.my_objective', "there is no module 'pakkage'"),
        ('package_of_mine', 'use one of'),  # a folder
        ('package_of_mine/my_objective.py', 'or the dotted path of your own module'),
        ('.my_objective', 'or the dotted path of your own module'),
        ('', 'or the dotted path of your own module'),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(own, name, message):
    own()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        default_config(name)
    assert '\n' not in str(error.value)


def test_a_name_that_is_a_group_already_is_refused(own):
    with pytest.raises(ValueError, match='would be the group lora, which is there already'):
        default_config(own(name='package_of_mine.lora'))


# --- kept with the run ----------------------------------------------------------------------------


def started(workdir, config):
    """A training that got as far as a checkpoint."""
    with claimed(workdir, identity(config)):
        (workdir / 'checkpoints' / '4').mkdir(parents=True, exist_ok=True)


def tiny_config(monkeypatch, name, *arguments):
    return parse_config(monkeypatch, TINY, f'--config.rl.objective={name}', *arguments)[0]


def test_the_objective_of_a_run_is_found_again(own, monkeypatch, tmp_path):
    name = own()
    warm = tiny_config(monkeypatch, name, '--config.my_objective.temperature=0.7')
    started(tmp_path / 'run', warm)
    config = run_config(tmp_path / 'run')
    assert (config.rl.objective, config.my_objective.temperature) == (name, 0.7)
    assert assemble(config).objective.draws == warm.corruption.draws
    own()  # forgets what was imported
    (tmp_path / 'package_of_mine').rename(tmp_path / 'gone')
    with pytest.raises(ValueError, match="config.json: rl.objective is '.*PYTHONPATH") as error:
        run_config(tmp_path / 'run')
    assert '\n' not in str(error.value)


def test_the_contents_of_the_file_belong_to_the_run(own, monkeypatch, tmp_path):
    config = tiny_config(monkeypatch, own())
    assert source_file(config.rl.objective).name == 'my_objective.py' and source_file('d1') is None
    started(tmp_path / 'run', config)
    started(tmp_path / 'run', tiny_config(monkeypatch, own()))
    own(objective_lines.EXAMPLE.read_text().replace('/ settings', '* settings'))
    with pytest.raises(ValueError, match='holds a training with another rl.objective;'):
        started(tmp_path / 'run', config)


def test_a_file_that_has_moved_is_the_same_objective_with_the_same_settings(
    own, monkeypatch, tmp_path
):
    warm = '--config.my_objective.temperature=0.7'
    started(tmp_path / 'run', tiny_config(monkeypatch, own(), warm))
    moved = own(name='elsewhere_of_mine.renamed')
    with pytest.raises(ValueError, match='with renamed.temperature 0.7, asked for 0.3'):
        started(tmp_path / 'run', tiny_config(monkeypatch, moved))
    same = '--config.renamed.temperature=0.7'
    started(tmp_path / 'run', tiny_config(monkeypatch, moved, same))


def test_another_objective_is_named_before_its_settings(monkeypatch, tmp_path):
    started(tmp_path, tiny_config(monkeypatch, 'spg'))
    other = tiny_config(monkeypatch, 'd1', '--config.d1.epsilon=0.9')
    with pytest.raises(
        ValueError, match="holds a training with rl.objective 'spg', asked for 'd1'"
    ):
        started(tmp_path, other)


def test_a_run_of_before_spg_had_a_group_is_read_and_goes_on(monkeypatch, tmp_path):
    config = tiny_config(monkeypatch, 'spg', '--config.spg.beta=1.25')
    started(tmp_path, config)
    path = tmp_path / 'config.json'
    old = json.loads(path.read_text())
    del old['spg'], old['rl']['baseline'], old['rl']['recipe'], old['optimizer']['schedule']
    path.write_text(json.dumps(old))
    assert run_config(tmp_path).spg.beta == run_config(tmp_path).rl.beta == 1.25
    started(tmp_path, config)
    path.write_text(json.dumps(old))
    config.spg.beta = 1.5
    with pytest.raises(ValueError, match='with spg.beta 1.25, asked for 1.5'):
        started(tmp_path, config)


@pytest.mark.parametrize(
    ('value', 'message'), [(5, 'rl.objective is 5, expected str'), ('spgg', "is 'spgg': use spg,")]
)
def test_a_saved_objective_that_is_none_is_one_line(tmp_path, value, message):
    saved = default_config().to_dict()
    saved['rl']['objective'] = value
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f'{re.escape(str(tmp_path))}/config.json: .*{message}'):
        run_config(tmp_path)


# --- the page -------------------------------------------------------------------------------------


def test_lines_of_code_are_counted_without_words():
    source = (
        '"""A title.\n\nMore.\n"""\n\nimport a  # why\n\n\n# A comment.\ndef f(\n    x,\n):\n'
        '    """Says what."""\n    text = """two\nlines"""\n    return text\n\n\nclass A:\n'
        "    '''Also.'''\n"
    )
    assert objective_lines.lines_of_code(source) == 8


def test_the_page_has_the_present_lines_of_code():
    page = objective_lines.PAGE.read_text()
    assert objective_lines.with_table('a\n\n| objective | lines of code | x |\n| 1 |\n\nb') == (
        f'a\n\n{objective_lines.table()}\n\nb'
    )
    remedy = 'run `python -m benchmarks.objective_lines --write`'
    assert page == objective_lines.with_table(page) and 'own_objective' in page, remedy


def test_the_example_is_short_and_the_page_names_what_exists():
    assert 15 <= objective_lines.lines_of_code(objective_lines.EXAMPLE.read_text()) <= 40
    page, folder = objective_lines.PAGE.read_text(), objective_lines.PAGE.parent
    for link in re.findall(r'\]\((\.\./[^)]*)\)', page):
        assert (folder / link).exists(), link
    assert EXAMPLE in page
