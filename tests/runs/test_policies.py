"""Policies on disk come back as they were saved, or an error of one line says why not."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from spg_jax.data.hf_tokenizer import HFTokenizer
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.export import export
from spg_jax.models import weights
from spg_jax.models.lora import LoRA
from spg_jax.models.peft import WEIGHTS
from spg_jax.models.policy import with_adapters
from spg_jax.models.transformer import TransformerConfig
from spg_jax.runs import policies
from spg_jax.runs.directory import policy_of_run
from tests.meshes import mesh_of
from tests.parameters import random_params
from tests.published import END, MASK, SIZE, asked, byte_pairs, save_checkpoint, save_tokenizer
from tests.runs.disks import full_disk

QUESTION = 'Reach 26 with 3, 44 and 7.'


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    """A folder with policy/ and adapted/, which adapts it, and the parameters of the first."""
    root = tmp_path_factory.mktemp('originals')
    tokenizer = WordTokenizer(['1', '2', '+', ':', 'x'])
    config = TransformerConfig(
        vocab_size=tokenizer.size, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24
    )
    policy = policies.make_policy(config, tokenizer)
    variables = {'params': random_params(policy.model)}
    policies.save_policy(root / 'policy', variables, config, tokenizer, {'made': 'here'})
    lora = LoRA(rank=4, alpha=8.0, targets=('query', 'down'))
    adapted, every = with_adapters(policy, variables, lora, 0, mesh_of())
    policies.save_policy(root / 'adapted', every, adapted.config, tokenizer, {}, root / 'policy')
    return root, variables


@pytest.fixture
def saved(originals, tmp_path):
    """A copy of the policy, which a test may damage, and its parameters."""
    root, variables = originals
    return shutil.copytree(root / 'policy', tmp_path / 'policy'), variables


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp('published')
    save_checkpoint(directory)
    return directory


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)])
def test_a_policy_comes_back_on_any_mesh(saved, sizes):
    directory, variables = saved
    policy, tokenizer, loaded = policies.load_policy(directory, mesh_of(*sizes))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), jax.device_get(variables))
    assert tokenizer.decode(tokenizer.encode('1 + 2 :')) == '1 + 2 :'
    assert not policy.allowed[policy.mask_id] and policy.allowed[policy.eos_id]
    assert policies.policy_notes(directory) == {'made': 'here'}


def test_a_policy_computes_as_suits_the_devices_it_is_loaded_on(saved):
    """The description does not say how the policy was computed where it was saved."""
    directory, _ = saved
    description = json.loads((directory / 'policy.json').read_text())
    assert not {'attention', 'remat', 'scan_unroll', 'quantize'} & set(description['model'])
    policy, _, _ = policies.load_policy(directory, mesh_of())
    assert (policy.config.attention, policy.config.remat) == ('folded', False)  # on a CPU
    execution = {'attention': 'einsum', 'remat': True, 'scan_unroll': 1}
    policy, _, _ = policies.load_policy(directory, mesh_of(), **execution)
    assert (policy.config.attention, policy.config.remat) == ('einsum', True)


def test_saving_again_replaces_the_policy(saved):
    directory, variables = saved
    tokenizer = WordTokenizer(['1', '2', '+', ':', 'x'])
    policy, _, _ = policies.load_policy(directory, mesh_of())
    doubled = jax.tree.map(lambda x: 2 * x, variables)
    policies.save_policy(directory, doubled, policy.config, tokenizer, {})
    _, _, loaded = policies.load_policy(directory, mesh_of())
    np.testing.assert_array_equal(loaded['params']['embedding'], doubled['params']['embedding'])
    assert [path.name for path in directory.parent.iterdir()] == ['policy']


def test_what_is_no_policy_says_so(saved, tmp_path):
    directory, _ = saved
    with pytest.raises(FileNotFoundError, match='nowhere does not exist'):
        policies.load_policy(tmp_path / 'nowhere', mesh_of())
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='policy.json'):
        policies.load_policy(tmp_path / 'empty', mesh_of())
    (directory / 'policy.json').write_text('{"model": {}}')
    with pytest.raises(ValueError, match='policy.json: notes is missing; restore it') as error:
        policies.load_policy(directory, mesh_of())
    assert '\n' not in str(error.value)


@pytest.fixture
def adapter(originals, saved):
    """A copy of an adapter of the policy `saved`, in the layout of PEFT."""
    adapted = shutil.copytree(originals[0] / 'adapted', saved[0].with_name('adapted'))
    description = json.loads((adapted / 'policy.json').read_text())
    description['base'] = str(saved[0])
    (adapted / 'policy.json').write_text(json.dumps(description))
    return adapted / 'adapter'


def test_an_adapter_is_no_policy(adapter):
    with pytest.raises(ValueError, match='adapter holds an adapter .*; give it as --adapter'):
        policies.load_policy(adapter, mesh_of())


@pytest.mark.parametrize('is_saved', [False, True])
def test_an_adapter_is_checked_before_its_base_is_read(saved, adapter, is_saved):
    """The parameters of the base do not even exist here."""
    directory, _ = saved
    shutil.rmtree(directory / 'params')
    arguments = (adapter.parent, None) if is_saved else (directory, adapter)

    def check(directory, adapter):
        return policies.check_policy(directory, mesh_of(), adapter)

    def load(directory, adapter):
        return policies.load_policy(directory, mesh_of(), adapter)

    assert check(*arguments) == LoRA(rank=4, alpha=8.0, targets=('query', 'down'))
    path = adapter / 'adapter_config.json'
    path.write_text(path.read_text().replace('"r": 4', '"r": 8'))
    for read in (check, load):
        with pytest.raises(ValueError, match='expected .* for rank 8') as error:
            read(*arguments)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('read', [policies.check_policy, policies.load_policy])
def test_a_mesh_that_would_cut_heads_is_refused_before_parameters_are_read(saved, read):
    """There are 4 heads and 2 key/value heads: on 4 devices each would have half a key."""
    directory, _ = saved
    shutil.rmtree(directory / 'params')
    with pytest.raises(ValueError, match='mesh.tensor is 4, .* divide the 2 model.kv_heads; use'):
        read(directory, mesh_of(2, 1, 4))


@pytest.mark.parametrize('damage', ['another width', 'a file cut short', 'a folder missing'])
def test_a_checkpoint_that_does_not_fit_names_its_directory(saved, damage):
    directory, _ = saved
    if damage == 'another width':
        description = json.loads((directory / 'policy.json').read_text())
        description['model']['width'] = 32
        (directory / 'policy.json').write_text(json.dumps(description))
    elif damage == 'a file cut short':
        largest = max(
            (p for p in directory.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size
        )
        largest.write_bytes(largest.read_bytes()[:100])
    else:
        (directory / 'params').rename(directory / 'other')
    with pytest.raises(ValueError, match='params cannot be read') as error:
        policies.load_policy(directory, mesh_of())
    assert '\n' not in str(error.value)


def test_a_published_checkpoint_is_a_policy_and_comes_back_from_where_it_is_saved(
    published, tmp_path
):
    sizes = (2, 2, 2)
    policy, tokenizer, variables = policies.load_policy(published, mesh_of(*sizes))
    assert (policy.mask_id, policy.eos_id, tokenizer.pad_id) == (MASK, END, END)
    assert np.flatnonzero(policy.allowed).tolist() == list(range(SIZE))
    config, _, imported = weights.load_checkpoint(published, attention='folded')
    assert policy.config == config
    jax.tree.map(assert_array_equal, jax.device_get(variables), {'params': imported})
    assert policies.policy_notes(published) == {}

    policies.save_policy(tmp_path / 'best', variables, config, tokenizer, {'made': 'here'})
    reloaded, saved_tokenizer, restored = policies.load_policy(tmp_path / 'best', mesh_of(*sizes))
    assert reloaded.config == config and isinstance(saved_tokenizer, HFTokenizer)
    jax.tree.map(assert_array_equal, jax.device_get(restored), {'params': imported})
    assert saved_tokenizer.encode_prompt(QUESTION, 'x') == asked(byte_pairs(), QUESTION, 'x')
    assert policies.policy_notes(tmp_path / 'best') == {'made': 'here'}
    # A policy may be saved in the directory that it was read from; its tokenizer must stay.
    policies.save_policy(tmp_path / 'best', restored, config, saved_tokenizer, {})
    assert policies.load_tokenizer(tmp_path / 'best').encode_prompt(QUESTION)


def test_the_tokenizer_is_checked_before_weights_are_read(published, tmp_path, monkeypatch):
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(weights, 'load_checkpoint', lambda *_: pytest.fail('read the weights'))
    (tmp_path / 'tokenizer.json').unlink()
    with pytest.raises(ValueError, match='the tokenizer cannot be read'):
        policies.load_policy(tmp_path, mesh_of())
    (tmp_path / 'tokenizer_config.json').unlink()
    with pytest.raises(ValueError, match='tokenizer_config.json does not exist'):
        policies.load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_in_a_policy_is_named(published, tmp_path):
    _, tokenizer, variables = policies.load_policy(published, mesh_of())
    config, _ = weights.read_config(published / 'config.json')
    policies.save_policy(tmp_path / 'best', variables, config, tokenizer, {})
    shutil.rmtree(tmp_path / 'best' / 'tokenizer')
    with pytest.raises(ValueError, match='best/tokenizer/tokenizer_config.json does not exist'):
        policies.load_policy(tmp_path / 'best', mesh_of())
    path = tmp_path / 'best' / 'policy.json'
    path.write_text(path.read_text().replace('"eos_id"', '"end"'))
    with pytest.raises(ValueError, match='policy.json: hf_tokenizer.eos_id is missing'):
        policies.load_policy(tmp_path / 'best', mesh_of())


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    save_checkpoint(tmp_path)
    backend = byte_pairs()
    backend.add_special_tokens([f'<extra {number}>' for number in range(20)])
    save_tokenizer(tmp_path, backend=backend)
    message = 'has ids up to 259, the embedding of the model has 256 rows'
    for load in (policies.load_tokenizer, lambda path: policies.load_policy(path, mesh_of())):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_a_flipped_bit_of_a_policy_is_noticed(saved, tmp_path):
    """Other values under the same description are not the policy that was saved."""
    directory, variables = saved
    policy, tokenizer, _ = policies.load_policy(directory, mesh_of())
    other = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), variables)
    policies.save_policy(tmp_path / 'other', other, policy.config, tokenizer, {})
    shutil.rmtree(directory / 'params')
    shutil.copytree(tmp_path / 'other' / 'params', directory / 'params')
    with pytest.raises(ValueError, match='params: the arrays are not those that were saved') as e:
        policies.load_policy(directory, mesh_of())
    assert '\n' not in str(e.value)


def test_a_policy_with_numbers_that_are_not_finite_is_refused(saved, tmp_path):
    """F90."""
    directory, variables = saved
    policy, tokenizer, _ = policies.load_policy(directory, mesh_of())
    params = variables['params']
    damaged = {'params': params | {'embedding': params['embedding'].at[1, 2].set(jnp.nan)}}
    policies.save_policy(tmp_path / 'damaged', damaged, policy.config, tokenizer, {})
    with pytest.raises(ValueError, match='damaged: params/embedding holds numbers that are not'):
        policies.load_policy(tmp_path / 'damaged', mesh_of())


def array_files(directory):
    """The files of a policy that hold the values of its arrays."""
    files = sorted((directory / 'params').rglob('d/*')) + [directory / 'adapter' / WEIGHTS]
    return [file for file in files if file.is_file()]


@pytest.mark.parametrize('trained', ['every parameter', 'adapters'])
def test_every_flipped_bit_of_the_arrays_is_noticed(saved, adapter, trained):
    """F00, forty bits in all. The policy is refused, or what comes back is right to the last bit,
    as it is where the bit belongs to nothing that is read."""
    directory = saved[0] if trained == 'every parameter' else adapter.parent
    policy, _, variables = policies.load_policy(directory, mesh_of())
    rng, files, refused = np.random.default_rng(0), array_files(directory), 0
    for trial in range(20):
        file = files[trial % len(files)]
        good = file.read_bytes()
        content = bytearray(good)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        try:
            loaded = policies.load_trained(directory, policy, mesh_of())
        except ValueError as error:
            assert '\n' not in str(error)
            refused += 1
        else:
            for name, arrays in loaded.items():
                jax.tree.map(assert_array_equal, arrays, variables[name])
        file.write_bytes(good)
    assert refused >= (12 if trained == 'every parameter' else 20)


@pytest.mark.parametrize('trained', ['every parameter', 'adapters'])
def test_a_full_disk_keeps_the_older_policy_and_is_one_line(saved, adapter, trained, caplog):
    directory = saved[0] if trained == 'every parameter' else adapter.parent
    policy, tokenizer, variables = policies.load_policy(directory, mesh_of())
    doubled = jax.tree.map(lambda x: 2 * x, variables)
    with full_disk(500), pytest.raises(OSError, match='could not be saved') as error:
        policies.save_policy(directory, doubled, policy.config, tokenizer, {}, saved[0])
    message = str(error.value)
    assert '\n' not in message and message.startswith(str(directory)) and not caplog.records
    _, _, loaded = policies.load_policy(directory, mesh_of())
    jax.tree.map(assert_array_equal, loaded, variables)


@pytest.mark.parametrize('trained', ['every parameter', 'adapters'])
def test_a_policy_that_cannot_be_read_back_replaces_none(saved, adapter, trained, monkeypatch):
    directory = saved[0] if trained == 'every parameter' else adapter.parent
    policy, tokenizer, variables = policies.load_policy(directory, mesh_of())
    doubled = jax.tree.map(lambda x: 2 * x, variables)
    monkeypatch.setattr('spg_jax.runs.arrays.digest_arrays', lambda arrays: 'another')
    with pytest.raises(OSError, match='could not be saved .*not those that were saved'):
        policies.save_policy(directory, doubled, policy.config, tokenizer, {}, saved[0])
    monkeypatch.undo()
    _, _, loaded = policies.load_policy(directory, mesh_of())
    jax.tree.map(assert_array_equal, loaded, variables)


def spoil(adapter, value):
    """Sets one number of an adapter."""
    tensors = load_file(adapter / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, adapter / WEIGHTS, {'format': 'pt'})


def test_adapters_that_are_not_finite_are_named_and_not_their_base(saved, adapter):
    spoil(adapter, np.nan)
    with pytest.raises(ValueError, match=f'^{adapter}: lora/.* holds numbers that are not finite'):
        policies.load_policy(saved[0], mesh_of(), adapter)


@pytest.mark.parametrize('value', [1.0, np.nan])
def test_damaged_adapters_are_not_exported(saved, adapter, tmp_path, value):
    spoil(adapter, value)
    with pytest.raises(ValueError, match='adapter: the arrays are not those that were saved'):
        export(adapter.parent, saved[0], tmp_path / 'out', whole=False)
    assert not (tmp_path / 'out').exists()


def test_a_policy_under_a_name_that_cannot_be_read_from_is_not_called_damaged(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / 'br[1]')
    with pytest.raises(ValueError, match='use a path without brackets') as error:
        policies.load_policy(tmp_path / 'br[1]', mesh_of())
    assert 'damaged' not in str(error.value) and '\n' not in str(error.value)


def test_a_run_without_its_best_policy_says_whether_it_is_still_to_come(tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(FileNotFoundError, match='best does not exist yet; wait for the first'):
        policy_of_run(tmp_path)
    (tmp_path / 'result.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match='best is gone, the policy of a finished run'):
        policy_of_run(tmp_path)
