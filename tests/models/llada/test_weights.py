"""LLaDA checkpoints: golden logits, the published names and shapes, and every refusal."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from spg_jax.models import weights
from spg_jax.models.llada.configuration import SpecialIds, read_config
from spg_jax.models.transformer import Transformer
from spg_jax.models.weights import load_checkpoint, tensor_shapes
from spg_jax.sharding import param_shardings
from tests.meshes import mesh_of

REFERENCE = Path(__file__).parents[2] / 'reference'
TINY = REFERENCE / 'tiny_llada'
BLOCK = 'model.transformer.blocks.1.'


@pytest.fixture
def checkpoint(tmp_path):
    """A function that writes a copy of the tiny checkpoint with other tensors or settings."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)

    def change(tensors=None, **config):
        if tensors is not None:
            loaded = load_file(TINY / 'model.safetensors')
            tensors(loaded)
            save_file(loaded, tmp_path / 'model.safetensors')
        published = json.loads((TINY / 'config.json').read_text()) | config
        (tmp_path / 'config.json').write_text(json.dumps(published))
        return tmp_path

    return change


def logits_of(config, params, tokens):
    apply = jax.jit(Transformer(config).apply)
    return apply({'params': params}, jnp.asarray(tokens), jnp.ones(tokens.shape, bool))


@pytest.mark.fast
@pytest.mark.numerical
@pytest.mark.compiled_as_users_do
def test_logits_equal_the_published_implementation():
    golden = np.load(REFERENCE / 'logits.npz')
    config, ids, params = load_checkpoint(TINY)
    assert ids == SpecialIds(mask=250, eos=1, pad=1)
    logits = logits_of(config, params, golden['tokens'])
    assert_allclose(logits, golden['logits'], atol=2e-5, rtol=0)


def test_overrides_choose_precision_and_execution_but_not_shapes():
    config, _, params = load_checkpoint(TINY, param_dtype='bfloat16', scan_unroll=2)
    assert config.scan_unroll == 2
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
    with pytest.raises(ValueError, match='model.width comes from .*config.json'):
        load_checkpoint(TINY, width=128)


def test_names_and_shapes_equal_those_of_llada_8b():
    folder = os.environ.get('SPG_JAX_REFERENCE')
    if folder:  # then test against the published files themselves
        folder = Path(folder) / 'reference' / 'llada_8b_instruct'
        names = json.loads((folder / 'model.safetensors.index.json').read_text())['weight_map']
    else:
        folder = REFERENCE / 'llada_8b'
        names = (folder / 'tensors.txt').read_text().split()
    config, ids = read_config(folder / 'config.json')
    shapes = tensor_shapes(config)
    assert set(shapes) == set(names)
    assert ids == SpecialIds(mask=126336, eos=126081, pad=126081)
    assert (config.dtype, config.rope_theta, config.head_dim) == ('bfloat16', 5e5, 128)
    # The size that the published index gives, in bytes of bfloat16.
    assert 2 * sum(np.prod(shape) for shape in shapes.values()) == 16_031_162_368
    prefix = 'model.transformer.blocks.31.'
    assert shapes[prefix + 'ff_out.weight'] == (4096, 12288)
    assert shapes[prefix + 'ff_proj.weight'] == (12288, 4096)
    assert shapes['model.transformer.ff_out.weight'] == (126464, 4096)


def test_grouped_keys_and_tied_embeddings_are_read(checkpoint):
    def shrink(tensors):
        del tensors['model.transformer.ff_out.weight']
        for name in [name for name in tensors if '.k_proj.' in name or '.v_proj.' in name]:
            tensors[name] = np.ascontiguousarray(tensors[name][:32])

    config, _, params = load_checkpoint(checkpoint(shrink, n_kv_heads=2, weight_tying=True))
    assert config.kv_heads == 2 and 'unembedding' not in params
    original = load_file(TINY / 'model.safetensors')[BLOCK + 'k_proj.weight']
    assert_array_equal(params['layers']['key']['kernel'][1], original[:32].T)


def split(directory):
    """Replaces the file by two bfloat16 shards and an index; returns the tensors and the index."""
    tensors = {
        name: tensor.astype(ml_dtypes.bfloat16)
        for name, tensor in load_file(TINY / 'model.safetensors').items()
    }
    names = sorted(tensors)
    parts = {'a.safetensors': names[:9], 'b.safetensors': names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    (directory / 'model.safetensors').unlink()
    index = {'weight_map': {name: file for file, part in parts.items() for name in part}}
    (directory / 'model.safetensors.index.json').write_text(json.dumps(index))
    return tensors, index


def test_shards_and_bfloat16_read_as_one_file(checkpoint):
    directory = checkpoint()
    tensors, index = split(directory)
    index_file = directory / 'model.safetensors.index.json'
    _, _, params = load_checkpoint(directory)
    assert_array_equal(
        params['layers']['up']['kernel'][1],
        tensors[BLOCK + 'up_proj.weight'].astype(np.float32).T,
    )

    index['weight_map']['extra.weight'] = 'b.safetensors'
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="b.safetensors: 'extra.weight' is missing"):
        load_checkpoint(directory)
    (directory / 'b.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='b.safetensors does not exist'):
        load_checkpoint(directory)
    index_file.write_text('{}')
    with pytest.raises(ValueError, match='index.json: weight_map is missing'):
        load_checkpoint(directory)


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4987202208\n'


@pytest.mark.parametrize('damage', [lambda whole: whole[:-1], lambda whole: b'', lambda _: POINTER])
def test_a_shard_that_is_not_there_whole_is_named_before_anything_is_read(
    checkpoint, monkeypatch, damage
):
    """A download stopped early, or the clone lacks git-lfs; the other shard is intact."""
    directory = checkpoint()
    split(directory)
    shard = directory / 'b.safetensors'
    shard.write_bytes(damage(shard.read_bytes()))
    monkeypatch.setattr(weights, 'read_parameters', lambda *_: pytest.fail('read a tensor'))
    with pytest.raises(ValueError, match='b.safetensors is damaged .*; download it again') as error:
        load_checkpoint(directory)
    assert '\n' not in str(error.value)


def test_shards_of_two_downloads_that_overlap_are_named(checkpoint):
    directory = checkpoint()
    _, index = split(directory)
    name = min(index['weight_map'])
    tensors = load_file(directory / 'b.safetensors')
    save_file({**tensors, name: tensors[max(tensors)]}, directory / 'b.safetensors')
    with pytest.raises(ValueError, match=f'b.safetensors: {name!r} is also in another shard'):
        load_checkpoint(directory)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2)])
def test_sharded_reading_equals_host_reading(sizes):
    mesh = mesh_of(*sizes)
    _, _, host = load_checkpoint(TINY)
    config, _, params = load_checkpoint(TINY, mesh)
    jax.tree.map(assert_array_equal, params, host)
    jax.tree.map(
        lambda leaf, sharding: leaf.sharding == sharding or pytest.fail('placed elsewhere'),
        params,
        param_shardings(Transformer(config), mesh),
    )


def drop(tensors):
    del tensors[BLOCK + 'q_proj.weight']


def add(tensors):
    tensors['model.transformer.blocks.2.q_proj.weight'] = np.zeros((64, 64), np.float32)


def misshape(tensors):
    tensors[BLOCK + 'up_proj.weight'] = np.zeros((64, 160), np.float32)


def quantise(tensors):
    tensors[BLOCK + 'up_proj.weight'] = np.zeros((160, 64), np.int8)


@pytest.mark.parametrize(
    ('tensors', 'message'),
    [
        (drop, r"blocks.1.q_proj.weight' is missing, expected \[64, 64\] .*n_layers 2"),
        (add, "blocks.2.q_proj.weight' is surplus"),
        (misshape, r"blocks.1.up_proj.weight' is \[64, 160\], expected \[160, 64\] .*d_model 64"),
        (quantise, "blocks.1.up_proj.weight' holds I8, expected one of F32, BF16, F16"),
    ],
)
def test_a_wrong_tensor_is_named(checkpoint, tensors, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(checkpoint(tensors))


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'model_type': 'llama'}, "model_type is 'llama', expected 'llada'"),
        ({'block_type': 'sequential'}, "block_type is 'sequential', expected 'llama'"),
        ({'include_bias': True}, 'include_bias is True, expected False'),
        ({'rope': None}, 'rope is missing'),
        ({'mask_token_id': 256}, 'mask_token_id is 256, outside the 256 rows'),
        ({'d_model': None}, 'd_model is None, expected int'),
        ({'n_heads': 5}, 'not a multiple of model.heads 5'),
        ({'torch_dtype': 'float16'}, "model.dtype is 'float16'"),
        ({'weight_tying': True}, r"ff_out.weight' is surplus.*weight_tying True"),
        ({'n_layers': 3}, r"blocks.2.attn_norm.weight' is missing.*n_layers 3"),
        ({'d_model': 128}, r"wte.weight' is \[256, 64\], expected \[256, 128\].*d_model 128"),
    ],
)
def test_a_configuration_of_another_model_is_refused(checkpoint, config, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(checkpoint(**config))


def test_a_checkpoint_of_another_architecture_is_refused_by_its_name(tmp_path):
    """The message names the families that are known."""
    config = {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'n_embd': 768}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    message = "config.json: architectures is .'GPT2LMHeadModel'.*LLaDAModelLM .LLaDA and LLaDA-1.5"
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(tmp_path)
    assert '\n' not in str(error.value)


def test_missing_and_damaged_files_are_named(checkpoint, tmp_path):
    directory = checkpoint()
    file, config = directory / 'model.safetensors', directory / 'config.json'
    whole = file.read_bytes()
    for damaged in (whole[:-100], b'not tensors', b'', whole[:20]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match='model.safetensors is damaged'):
            load_checkpoint(directory)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='holds neither model.safetensors nor'):
        load_checkpoint(directory)
    config.write_text('{"model_type": ')
    with pytest.raises(ValueError, match='config.json is not JSON'):
        load_checkpoint(directory)
    config.write_text('[]')
    with pytest.raises(ValueError, match=r'config.json: it is \[\], expected object'):
        load_checkpoint(directory)
    config.unlink()
    with pytest.raises(FileNotFoundError, match='config.json does not exist'):
        load_checkpoint(directory)
