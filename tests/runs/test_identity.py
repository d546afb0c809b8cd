"""Which settings a training may go on with, and that the contents of files belong to it."""

import json

import pytest

from configs import countdown
from spg_jax.assembly import assemble
from spg_jax.pretrain import made_of
from spg_jax.runs.claim import claimed
from spg_jax.runs.directory import identity
from spg_jax.runs.identity import FREE, GROWING, changed_settings, digest_path

pytestmark = pytest.mark.fast


def saved(config):
    return json.loads(json.dumps(identity(config)))


def started(workdir, config):
    """A training that got as far as a checkpoint."""
    with claimed(workdir, identity(config)):
        (workdir / 'checkpoints' / '4').mkdir(parents=True)


def test_every_free_setting_exists():
    config = countdown.get_config('tiny')
    for key in FREE | GROWING:
        group, name = key.split('.')
        assert name in config[group]


@pytest.mark.parametrize(
    ('key', 'value'), [('mesh.data', 2), ('rl.microbatch', 8), ('train.steps', 9)]
)
def test_a_training_goes_on_elsewhere_and_further_and_says_so(tmp_path, capsys, key, value):
    config = countdown.get_config('tiny')
    started(tmp_path, config)
    old = config.to_dict()
    group, name = key.split('.')
    config[group][name] = value
    with claimed(tmp_path, identity(config)):
        pass
    line = f'{tmp_path}: going on with {key} {value} instead of {old[group][name]}\n'
    assert capsys.readouterr().out == line
    assert json.loads((tmp_path / 'config.json').read_text())[group][name] == value


@pytest.mark.parametrize(
    ('key', 'value'),
    [('spg.beta', 2.0), ('train.steps', 4), ('train.seed', 1), ('rl.group_size', 4)],
)
def test_what_changes_what_is_learned_is_refused(tmp_path, key, value):
    config = countdown.get_config('tiny')
    started(tmp_path, config)
    group, name = key.split('.')
    config[group][name] = value
    with pytest.raises(ValueError, match=f'holds a training with {key} ') as error:
        with claimed(tmp_path, identity(config)):
            pass
    assert '\n' not in str(error.value)


def test_a_finished_training_answers_only_to_its_own_settings(tmp_path):
    """Its checkpoints may be gone."""
    config = countdown.get_config('tiny')
    with claimed(tmp_path, identity(config)):
        pass
    config.rl.beta = 3.0  # another name of spg.beta
    with pytest.raises(ValueError, match='spg.beta 1.5, asked for 3.0'):
        with claimed(tmp_path, identity(config), finished=True):
            pass
    with claimed(tmp_path, identity(config)):  # never got as far as a checkpoint
        pass


def test_other_contents_of_a_named_file_are_refused(tmp_path):
    config = countdown.get_config('tiny')
    wording = tmp_path / 'wording.txt'
    wording.write_text('{numbers} = {target} :')
    config.task.prompt_template = str(wording)
    started(tmp_path / 'run', config)
    wording.write_text('= {target} {numbers} :')
    with pytest.raises(ValueError, match='holds a training with another task.prompt_template;'):
        with claimed(tmp_path / 'run', identity(config)):
            pass


def test_a_digest_of_a_directory_depends_on_names_and_contents(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'x').write_bytes(b'1')
    first = digest_path(tmp_path / 'a')
    (tmp_path / 'a' / 'y').write_bytes(b'')
    second = digest_path(tmp_path / 'a')
    (tmp_path / 'a' / 'x').write_bytes(b'2')
    assert len({first, second, digest_path(tmp_path / 'a')}) == 3
    assert digest_path(tmp_path / 'nothing') == ''


def test_ends_of_large_files_count(tmp_path, monkeypatch):
    monkeypatch.setattr('spg_jax.runs.identity.WHOLE', 10)
    monkeypatch.setattr('spg_jax.runs.identity.SAMPLE', 4)
    content, digests = bytearray(1000), set()
    for place in (None, 0, 999):
        changed = content.copy()
        if place is not None:
            changed[place] = 1
        (tmp_path / 'large').write_bytes(changed)
        digests.add(digest_path(tmp_path / 'large'))
    assert len(digests) == 3


def test_a_config_of_before_there_were_digests_of_files_goes_on():
    config = countdown.get_config('tiny')
    old = {group: settings for group, settings in saved(config).items() if group != 'files'}
    assert changed_settings('DIR', old, saved(config), 'config.json') == []


def test_a_setting_that_is_newer_than_the_training_has_its_default():
    config = countdown.get_config('tiny')
    old = saved(config)
    del old['task']['fields']
    assert changed_settings('DIR', old, saved(config), 'config.json') == []
    config.task.fields = 'target:goal'
    with pytest.raises(ValueError, match="task.fields '', asked for 'target:goal'"):
        changed_settings('DIR', old, saved(config), 'config.json')


@pytest.mark.parametrize(
    ('on', 'first'),
    [
        ({'muon_rate': 0.01}, 'muon_rate 0.01, asked for 0.0'),
        ({'keep_weight': 0.5}, 'keep_weight 0.5, asked for 0.0'),
        ({'edit_weight': 1.0, 'wrong_share': 0.1}, 'edit_weight 1.0, asked for 0.0'),
    ],
)
def test_what_a_base_policy_no_longer_names_is_off(on, first):
    """Settings of a loss or an optimizer that is off are left out of what makes a policy."""
    config = countdown.get_config('tiny')
    config.base.muon_rate = 0.0
    task = assemble(config).task
    without = made_of(config, task)
    config.base.update(on)
    with pytest.raises(ValueError, match=f'holds a training with base.{first};'):
        changed_settings('DIR', made_of(config, task), without, 'config.json')


def test_what_no_longer_exists_or_is_free_may_be_missing():
    wanted = saved(countdown.get_config('tiny'))
    old = wanted | {'base': wanted['base'] | {'gone': 1}, 'model': wanted['model'] | {'remat': 7}}
    wanted = wanted | {'model': {k: v for k, v in wanted['model'].items() if k != 'remat'}}
    assert changed_settings('DIR', old, wanted, 'config.json') == []


def test_a_file_that_has_moved_is_the_same_file(tmp_path):
    """Of a prompt template, a base and adapters the contents count, and not the path."""
    config = countdown.get_config('tiny')
    for name in ('a', 'b'):
        (tmp_path / name).write_text('{numbers} = {target} :')
    config.task.prompt_template = str(tmp_path / 'a')
    started(tmp_path / 'run', config)
    config.task.prompt_template = str(tmp_path / 'b')
    with claimed(tmp_path / 'run', identity(config)):
        pass
    (tmp_path / 'b').write_text('= {target} {numbers} :')
    with pytest.raises(ValueError, match='holds a training with another task.prompt_template;'):
        with claimed(tmp_path / 'run', identity(config)):
            pass


def test_two_paths_at_which_nothing_is_are_two_settings():
    old, new = ({'lora': {'adapter': name}, 'files': {'lora.adapter': ''}} for name in 'ab')
    with pytest.raises(ValueError, match="lora.adapter 'a', asked for 'b'"):
        changed_settings('DIR', old, new, 'config.json')


@pytest.mark.parametrize('key', ['sampling.sampler', 'evaluation.sampler'])
def test_the_file_of_a_sampler_of_ones_own_belongs_to_a_training(tmp_path, monkeypatch, key):
    monkeypatch.syspath_prepend(tmp_path)
    name = f'rules_of_{key.partition(".")[0]}'
    file = tmp_path / f'{name}.py'
    file.write_text('def rule(view, config):\n    return view.largest\n')
    config = countdown.get_config('tiny')
    group, setting = key.split('.')
    config[group][setting] = f'{name}.rule'
    before = saved(config)
    assert saved(config) == before
    file.write_text(file.read_text().replace('largest', 'negative_entropy'))
    assert saved(config) != before
