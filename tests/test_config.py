"""Configurations: every setting is used, every preset assembles, and wrong settings are refused."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from spg_jax import sharding, tasks
from spg_jax.assembly import assemble, check_mesh
from spg_jax.config import default_config
from spg_jax.diffusion.corruption import Corruption
from spg_jax.diffusion.samplers import decoder, rules, settings
from spg_jax.explain import meanings_of
from spg_jax.method import alias_names
from spg_jax.models import layers, lora
from spg_jax.models.lora import Adapter, LoRA
from spg_jax.models.transformer import Block, Transformer, TransformerConfig
from spg_jax.presets import HARDWARE
from spg_jax.rl import learner
from spg_jax.rl.batching import Batching
from spg_jax.rl.objectives import REGISTRY
from spg_jax.train import train
from spg_jax.training import optimizers

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).parent.parent


def leaves(config):
    return [(group, leaf) for group, settings in config.items() for leaf in settings]


# The settings of these groups become fields of a part, which this code uses.
USERS = {
    'model': [Transformer, Block, TransformerConfig.head_dim.fget],
    'lora': [LoRA.scale.fget, Adapter, layers],
    'sampling': [settings, rules, decoder],
    'corruption': [Corruption.__call__, Corruption._choose_blocks, Corruption._mask_completion],
    'rl': [Batching.rows.fget, Batching.rows_at_once.fget, learner.make_update, train],
    'optimizer': [optimizers.for_rl],
}
PROTOCOL = [
    (group, leaf)
    for group, leaf in leaves(default_config())
    if group not in REGISTRY and not (group == 'rl' and leaf in alias_names())
]
OWN = [(name, leaf) for name in REGISTRY for leaf in default_config(name)[name]]


@pytest.mark.parametrize(('name', 'leaf'), OWN)
def test_every_setting_of_an_objective_is_read_and_says_what_it_means(name, leaf):
    module = importlib.import_module(f'spg_jax.rl.objectives.{name}')
    # The file that declares a setting reads it. An objective may have the settings of another.
    declares = next(x for x in reversed(module.Settings.__mro__) if leaf in vars(x))
    source = inspect.getsource(importlib.import_module(declares.__module__))
    assert re.search(rf'\bsettings\.{leaf}\b', source)
    assert len(meanings_of(name)[f'{name}.{leaf}'].split()) > 2


@functools.cache
def source_of_package():
    """The text of all modules together."""
    return '\n'.join(path.read_text() for path in (REPOSITORY / 'spg_jax').rglob('*.py'))


@pytest.mark.parametrize(('group', 'leaf'), PROTOCOL)
def test_every_setting_is_read(group, leaf):
    if group == 'mesh':
        assert leaf in sharding.AXES
        return
    directly = re.search(rf'\b{group}\.{leaf}\b', source_of_package())
    users = map(inspect.getsource, USERS.get(group, ()))
    fields = rf'(config|self|settings|batching|lora)\.{leaf}\b'
    assert directly or any(re.search(fields, source) for source in users)


@pytest.mark.parametrize(('group', 'leaf'), PROTOCOL)
def test_every_setting_says_what_it_means(group, leaf):
    source = (REPOSITORY / 'spg_jax' / 'config.py').read_text()
    section = source[source.index(f'        {group}=c(') :]
    line = re.search(rf'\b{leaf}=.*', section)[0]
    _, comment = line.split('  # ')
    assert meanings_of('spg')[f'{group}.{leaf}'] == comment


@pytest.mark.parametrize(
    ('task', 'presets'),
    [
        ('countdown', ('small', 'tiny', 'worked', *HARDWARE)),
        ('gsm8k', tuple(HARDWARE)),
        ('math500', tuple(HARDWARE)),
        ('sudoku', ('small', 'tiny', *HARDWARE)),
    ],
)
def test_presets_validate(task, presets):
    module = importlib.import_module(f'configs.{task}')
    assert module.PRESETS == presets and task in tasks.TASKS
    for preset in presets:
        config = module.get_config(preset)
        assert config.task.name == task
        assert assemble(config).evaluation_task.format in ('compact', 'worked', 'published_eval')


@pytest.mark.parametrize('task', sorted(tasks.TASKS))
def test_an_unknown_preset_is_one_line(task):
    preset = 'large' if task in ('countdown', 'sudoku') else 'small'
    with pytest.raises(
        ValueError, match=f"configs/{task}.py has no preset '{preset}'.*use "
    ) as error:
        importlib.import_module(f'configs.{task}').get_config(preset)
    assert '\n' not in str(error.value) and 'llada_8b' in str(error.value)


@pytest.mark.parametrize('preset', HARDWARE)
def test_the_published_recipe(preset):
    """The numbers of the publication (SPG, appendix) were typed here a second time."""
    for task, steps, temperature, beta, prompt, shots in (
        ('countdown', 6000, 0.9, 1.5, 200, 0),
        ('gsm8k', 6000, 0.9, 1.5, 200, 0),
        ('math500', 4000, 0.9, 1.5, 200, 0),
        ('sudoku', 2500, 0.3, 1.0, 1500, 3),
    ):
        config = importlib.import_module(f'configs.{task}').get_config(preset)
        assert config.optimizer.learning_rate == 3e-6 and config.optimizer.grad_clip == 0.2
        assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.99)
        assert (config.optimizer.weight_decay, config.optimizer.warmup_fraction) == (0.1, 1e-4)
        assert (config.corruption.kind, config.spg.negative) == ('block', 'mixture')
        assert (config.sampling.commit, config.sampling.guidance) == ('low_confidence', 0)
        assert (config.rl.group_size, config.rl.inner_updates, config.corruption.draws) == (6, 4, 2)
        assert config.rl.prompts * config.rl.group_size == 96
        assert config.sampling.length == 256 and config.sampling.steps == 128
        assert config.sampling.block_length == 32 and config.corruption.prompt_rate == 0.15
        assert (config.spg.omega, config.spg.beta) == (0.5, beta)
        assert config.sampling.temperature == temperature
        assert config.sampling.prompt_length == prompt
        assert config.train.steps == steps
        assert (config.task.shots, config.task.rules) == (shots, 'released')
        assert tuple(config.evaluation.lengths) == (128, 256, 512)
        assert tuple(config.evaluation.steps) == (64, 128, 256)
        assert config.evaluation.block_length == 32
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 64, 0.05)
        assert config.lora.targets == lora.TARGETS and len(lora.TARGETS) == 7


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'sampling.length': 250}, 'sampling.length 250'),
        ({'sampling.steps': 300}, '300'),
        ({'sampling.commit': 'first'}, "sampling.commit is 'first'; use one of low_confidence"),
        ({'sampling.sampler': 'treshold'}, "sampling.sampler is 'treshold'; use threshold, or"),
        ({'sampling.sampler': 'no_package.rule'}, "sampling.sampler is 'no_package.rule': Module"),
        ({'sampling.threshold': 0.0}, 'sampling.threshold is 0.0; use a probability above 0'),
        ({'sampling.threshold': 1.1}, 'sampling.threshold is 1.1; use a probability above 0'),
        ({'sampling.factor': 0.0}, 'sampling.factor is 0.0; use a number above 0'),
        ({'sampling.entropy_bound': -0.1}, 'sampling.entropy_bound is -0.1; use 0 or more nats'),
        ({'sampling.remasks': -1}, 'sampling.remasks is -1; use 0 or more'),
        ({'sampling.cache': 'block'}, "sampling.cache is 'block'; use one of "),
        ({'sampling.refresh': 0}, 'sampling.refresh is 0; use 1 or more steps'),
        (
            {'sampling.preset': 'faster'},
            "sampling.preset is 'faster', perhaps fast; use",
        ),
        (
            {'sampling.cache': 'dual', 'sampling.guidance': 1.0},
            "sampling.cache 'dual' holds one prompt, and sampling.guidance 1.0 reads two",
        ),
        (
            {'sampling.cache': 'dual', 'corruption.informed': True},
            "sampling.cache 'dual' leaves out positions whose influence is measured",
        ),
        (
            {'sampling.sampler': 'threshold', 'corruption.informed': True},
            "sampling.sampler 'threshold' does not commit evenly, which influence is measured by",
        ),
        ({'evaluation.steps': (64,)}, 'pair up'),
        ({'data.long_prompts': 'cut'}, "data.long_prompts is 'cut'; use one of drop"),
        ({'rl.objective': 'spgg'}, "rl.objective is 'spgg': use spg, or another of"),
        ({'rl.recipe': 'best'}, "rl.recipe is 'best'; use one of ours, published"),
        ({'spg.negative': 'worse'}, 'spg.negative'),
        ({'spg.bound': 'tight'}, 'spg.bound'),
        ({'spg.estimator': 'paper'}, "corruption.kind 'block'"),
        ({'spg.estimator': 'block', 'corruption.kind': 'uniform'}, "corruption.kind 'uniform'"),
        ({'rl.group_size': 1, 'rl.prompts': 6}, 'rl.group_size'),
        ({'rl.microbatch': 7}, 'rl.microbatch 7'),
        ({'rl.draws_per_pass': 3}, 'rl.draws_per_pass 3'),
        ({'spg.beta': 0.5}, 'spg.beta'),
        ({'rl.omega': 1.5}, 'spg.omega'),
        ({'corruption.draws': 0}, 'corruption.draws'),
        ({'corruption.kind': 'blocks'}, 'corruption.kind'),
        ({'base.stages': ((10, 1.5),)}, '(10, 1.5)'),
        ({'base.stages': (300, 1.0)}, 'base.stages has 300'),
        ({'base.stages': ()}, 'one step or more'),
        ({'task.name': 'chess'}, 'chess'),
        ({'task.prompt_template': 'nowhere.txt'}, 'nowhere.txt'),
        ({'task.name': 'gsm8k'}, "format of task gsm8k is 'compact'"),
        ({'task.shots': 3}, 'task.shots is 3'),
        ({'task.name': 'sudoku', 'task.format': 'published_train', 'task.shots': 4}, '0 to 3'),
        ({'task.name': 'sudoku', 'task.format': 'published_train', 'task.shots': -1}, '0 to 3'),
        ({'task.rules': 'new'}, "task.rules of countdown is 'new'"),
        ({'task.fields': 'goal:x'}, "task.fields is 'goal:x'"),
        ({'model.width': 25}, 'model.width 25'),
        ({'optimizer.learning_rate': -1e-4}, 'optimizer.learning_rate'),
        ({'lora.rank': -4}, 'lora.rank is -4'),
        ({'lora.rank': 4, 'lora.targets': ('o_proj',)}, 'o_proj'),
        ({'optimizer.b1': 1.5}, 'optimizer.b1'),
        ({'base.grad_clip': float('nan')}, 'base.grad_clip'),
        ({'spg.beta': float('nan')}, 'spg.beta'),
        ({'evaluation.block_length': 5}, 'evaluation.block_length 5'),
        ({'spg.estimator': 'block', 'corruption.block_draw': 'released'}, 'corruption.block_draw'),
        ({'train.steps': 0}, 'train.steps'),
        ({'rl.generation_batch': 36}, 'does not divide the 96 rows of a rollout batch (rl.prompts'),
        ({'rl.generation_batch': 36}, 'use 32, or 0 for all at once'),
        ({'rl.microbatch': 7}, 'rl.microbatch 7 does not divide the 96 rows'),
        ({'rl.microbatch': 7}, 'use 6'),
        ({'sampling.prompt_buckets': (128, 64)}, 'sampling.prompt_buckets is (128, 64)'),
        ({'sampling.prompt_buckets': (64, 200)}, 'below sampling.prompt_length 200'),
        ({'checkpoint.every': 0}, 'checkpoint.every'),
        ({'train.diagnose_every': -1}, 'train.diagnose_every'),
        ({'train.profile': -1}, 'train.profile'),
        ({'train.profile': 6001}, 'after the last of train.steps'),
        ({'guard.rollbacks': -1}, 'guard.rollbacks is -1'),
        ({'guard.reward_fall': 1.0}, 'guard.reward_fall is 1.0'),
    ],
)
def test_what_cannot_work_is_refused_with_key_and_value(change, message):
    config = default_config()
    for name, value in change.items():
        group, leaf = name.split('.')
        config[group][leaf] = value
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        assemble(config)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('length', 'headline'), [(256, (256, 128)), (64, (128, 64))])
def test_the_headline_is_the_length_trained_at_or_else_the_first(length, headline):
    config = default_config()
    config.sampling.update(length=length, steps=length // 2)
    decoding = assemble(config).evaluation.headline
    assert (decoding.length, decoding.steps) == headline


def test_groups_do_not_straddle_processes(monkeypatch):
    batching = assemble(default_config()).batching
    mesh = sharding.make_mesh({'data': 8})
    monkeypatch.setattr('spg_jax.rl.batching.own_rows', lambda mesh, rows: np.arange(12, 24))
    assert batching.local_prompts(mesh).tolist() == [2, 3]
    for rows in (np.arange(16, 24), np.r_[0:3, 48:51]):
        monkeypatch.setattr('spg_jax.rl.batching.own_rows', lambda *_, rows=rows: rows)
        with pytest.raises(
            ValueError,
            match='rl.prompts is 16: groups of 6 .* use a multiple of 8',
        ):
            batching.local_prompts(mesh)


def check_default_on(mesh, config=None):
    config = config or default_config()
    check_mesh(config, assemble(config), mesh)


def test_a_mesh_that_would_cut_heads_is_refused():
    with pytest.raises(ValueError, match='mesh.tensor is 8, which does not divide the 4 model.hea'):
        check_default_on(sharding.make_mesh({'tensor': 8}))


@pytest.mark.parametrize('key', ['rl.microbatch', 'rl.generation_batch', 'base.batch_size'])
def test_rows_that_do_not_split_over_the_devices_are_refused(key):
    config = default_config()
    mesh = sharding.make_mesh({'data': 4, 'fsdp': 2})
    check_default_on(mesh, config)
    group, leaf = key.split('.')
    config[group][leaf] = 12
    with pytest.raises(ValueError, match=f'{key} is 12.*multiple of 8'):
        check_default_on(mesh, config)
