"""Adapters and checkpoints are written in published layouts, and read back unchanged."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from spg_jax.models import peft
from spg_jax.models.lora import COLLECTION, LoRA
from spg_jax.models.peft import load_adapter, save_adapter
from spg_jax.models.policy import Policy, with_adapters
from spg_jax.models.transformer import Transformer
from spg_jax.models.weights import load_checkpoint, save_checkpoint, tensor_shapes
from spg_jax.sharding import abstract_params
from tests.meshes import mesh_of

TINY = Path(__file__).parents[1] / 'reference' / 'tiny_llada'
WEIGHTS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
SIZES = LoRA(rank=4, alpha=2.0, dropout=0.05, targets=('query', 'up', 'attention_out'))


def zeros_of(config, lora):
    model = Transformer(dataclasses.replace(config, lora=lora))
    abstract = abstract_params(model, collection=COLLECTION)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)


@pytest.fixture
def saved(tmp_path):
    """A saved adapter of the tiny checkpoint: its directory, model configuration and values."""
    config, _, _ = load_checkpoint(TINY)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), zeros_of(config, SIZES)
    )
    adapted = dataclasses.replace(config, lora=SIZES)
    save_adapter(tmp_path / 'adapter', adapters, adapted, 'the/base')
    return tmp_path / 'adapter', config, adapters


def test_adapters_are_written_as_peft_reads_them(saved):
    directory, config, adapters = saved
    tensors = load_file(directory / WEIGHTS)
    name = 'base_model.model.model.transformer.blocks.{}.{}.lora_{}.weight'
    modules = {'query': 'q_proj', 'up': 'up_proj', 'attention_out': 'attn_out'}
    assert len(tensors) == 3 * 2 * config.layers
    for target, module in modules.items():
        for layer in range(config.layers):
            factors = adapters['layers'][target]['adapter']
            assert_array_equal(tensors[name.format(layer, module, 'A')], factors['a'][layer].T)
            assert_array_equal(tensors[name.format(layer, module, 'B')], factors['b'][layer].T)
    settings = json.loads((directory / CONFIG).read_text())
    expected = {
        'peft_type': 'LORA',
        'r': 4,
        'lora_alpha': 2.0,
        'lora_dropout': 0.05,
        'base_model_name_or_path': 'the/base',
        'bias': 'none',
    }
    assert settings | expected == settings


def test_peft_puts_adapters_on_what_has_one_and_nothing_else(tmp_path):
    """PEFT matches a regular expression with the whole name of a module."""
    config, _, _ = load_checkpoint(TINY)
    down = LoRA(rank=4, alpha=2.0, targets=('query', 'down'))
    adapted = dataclasses.replace(config, lora=down)
    save_adapter(tmp_path, zeros_of(config, down), adapted, 'the/base')
    expression = json.loads((tmp_path / CONFIG).read_text())['target_modules']
    modules = {name.removesuffix('.weight') for name in tensor_shapes(config)}
    adapted = {name for name in modules if re.fullmatch(expression, name)}
    wrapped = {name.split('.lora_')[0] for name in load_file(tmp_path / WEIGHTS)}
    assert wrapped == {f'base_model.model.{name}' for name in adapted}
    assert 'model.transformer.ff_out' not in adapted


@pytest.mark.parametrize('sizes', [None, (2, 2, 2)])
def test_adapters_come_back_on_any_mesh(saved, sizes):
    directory, config, adapters = saved
    lora, loaded = load_adapter(directory, config, mesh_of(*sizes) if sizes else None)
    assert set(lora.targets) == set(SIZES.targets)
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 2.0, 0.05)
    jax.tree.map(assert_array_equal, loaded, adapters)


def test_target_modules_the_architecture_does_not_have_are_no_error(saved):
    """Published adapters of LLaDA name o_proj, gate_proj and down_proj, which match nothing."""
    directory, config, adapters = saved
    change(directory, target_modules=['q_proj', 'up_proj', 'attn_out', 'o_proj', 'gate_proj'])
    _, loaded = load_adapter(directory, config)
    jax.tree.map(assert_array_equal, loaded, adapters)


def change(directory, **changes):
    settings = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps(settings))


def retensor(function):
    def damage(directory):
        tensors = load_file(directory / WEIGHTS)
        function(tensors)
        save_file(tensors, directory / WEIGHTS)

    return damage


NAME = 'base_model.model.model.transformer.blocks.1.q_proj.lora_A.weight'


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda d: (d / CONFIG).unlink(), 'adapter_config.json does not exist'),
        (lambda d: (d / WEIGHTS).unlink(), 'adapter_model.safetensors does not exist'),
        (lambda d: (d / CONFIG).write_text('{'), 'adapter_config.json is not JSON'),
        (
            lambda d: (d / CONFIG).write_text('[]'),
            r'adapter_config.json: it is \[\], expected object',
        ),
        (lambda d: (d / WEIGHTS).write_bytes(b'12345'), 'damaged'),
        (lambda d: change(d, peft_type='IA3'), "peft_type is 'IA3'"),
        (lambda d: change(d, use_dora=True), 'use_dora is True'),
        (lambda d: change(d, modules_to_save=['wte']), 'modules_to_save'),
        (lambda d: change(d, rank_pattern={'q_proj': 2}), 'rank_pattern'),
        (lambda d: change(d, r=8), r'\[4, 64\], expected \[8, 64\] for rank 8'),
        (retensor(lambda t: t.pop(NAME)), f'{NAME!r} is missing'),
        (retensor(lambda t: t.update({'extra': t[NAME]})), "'extra' is surplus"),
        (retensor(lambda t: t.update({NAME: t[NAME].astype(np.int32)})), 'holds I32'),
        (retensor(lambda t: t.clear()), 'holds no tensor'),
    ],
)
def test_adapters_that_do_not_fit_are_refused(saved, damage, message):
    directory, config, _ = saved
    damage(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_adapter(directory, config)
    assert '\n' not in str(error.value)


def test_a_checkpoint_is_no_adapter(saved):
    _, config, _ = saved
    with pytest.raises(FileNotFoundError, match='adapter_config.json does not exist; expected an'):
        load_adapter(TINY, config)


def test_nothing_is_read_of_an_adapter_of_which_something_does_not_fit(saved, monkeypatch):
    directory, config, _ = saved
    retensor(lambda tensors: tensors.pop(max(tensors)))(directory)
    monkeypatch.setattr(peft, 'read_parameters', lambda *_: pytest.fail('read a tensor'))
    with pytest.raises(ValueError, match='is missing'):
        load_adapter(directory, config)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'rank': 8}, 'rank 4, .* asks for rank 8; set --config.lora.rank=4, or'),
        (
            {'rank': 8, 'alpha': 4.0},
            'rank 4, alpha 2.0, .* asks for rank 8, alpha 4.0; set --config.lora.rank=4 '
            '--config.lora.alpha=2.0, or',
        ),
        (
            {'targets': ('up',)},
            r"set --config.lora.targets=\"\('query', 'attention_out', 'up'\)\",",
        ),
    ],
)
def test_adapters_other_than_those_configured_are_refused(saved, changes, message):
    directory, config, _ = saved
    lora, adapters = load_adapter(directory, config)
    policy = Policy(
        dataclasses.replace(config, lora=lora), 250, 1, np.ones(config.vocab_size, bool)
    )
    configured = dataclasses.replace(lora, **changes)
    with pytest.raises(ValueError, match=message) as error:
        with_adapters(policy, {COLLECTION: adapters}, configured, 0, mesh_of())
    assert '\n' not in str(error.value)


def tensors_of(directory):
    tensors = {}
    for path in directory.glob('*.safetensors'):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize('shard_bytes', [10**9, 40_000])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_checkpoint_leaves_as_it_came(tmp_path, shard_bytes, dtype):
    """The file or the shards are equal bit for bit, from parameters split over 8 devices."""
    source = tmp_path / 'source'
    source.mkdir()
    original = load_file(TINY / 'model.safetensors')
    if dtype == 'bfloat16':
        original = {name: x.astype(ml_dtypes.bfloat16) for name, x in original.items()}
    save_file(original, source / 'model.safetensors')
    published = json.loads((TINY / 'config.json').read_text()) | {'torch_dtype': dtype}
    (source / 'config.json').write_text(json.dumps(published))
    _, _, params = load_checkpoint(source, mesh_of(2, 2, 2))
    save_checkpoint(tmp_path / 'out', params, source, shard_bytes)
    written = tensors_of(tmp_path / 'out')
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert written[name].dtype == value.dtype
        assert_array_equal(written[name].view(np.uint8), value.view(np.uint8))
    assert (len(list((tmp_path / 'out').glob('*.safetensors'))) > 1) == (shard_bytes < 10**9)
    _, _, again = load_checkpoint(tmp_path / 'out')
    jax.tree.map(assert_array_equal, again, jax.device_get(params))
