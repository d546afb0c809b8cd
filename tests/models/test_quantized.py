"""A quantised base is frozen and acts like its dequantised kernels, which take more bytes."""

import dataclasses
import functools
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from configs import countdown
from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.models import weights
from spg_jax.models.lora import ADAPTER, COLLECTION, TARGETS, LoRA
from spg_jax.models.policy import Policy, with_adapters
from spg_jax.models.quantized import FORMATS, check_format
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.planning.memory import local_bytes
from spg_jax.pretrain import _starting_point, base_directory
from spg_jax.runs import policies
from spg_jax.training.train_state import initial_state
from tests.meshes import mesh_of
from tests.parameters import random_params
from tests.published import save_checkpoint

pytestmark = pytest.mark.numerical

SIZES = LoRA(rank=4, alpha=8.0)
SHAPES = [(64, 64), (64, 160), (160, 64)]  # of the kernels of one layer
BITS = {'int8': 8, 'int4': 4, 'nf4': 4}
# Format -> tile of a kernel with 64 inputs, and of one with 160.
TILES = {'int8': (64, 160), 'int4': (64, 32), 'nf4': (64, 32)}


def nf4_levels():
    """The levels of NF4 as its authors compute them (arXiv 2305.14314, section 3, and their code).

    They are quantiles of a normal distribution, eight above 0 and seven below, over the largest.
    """
    above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    return np.sort(np.concatenate([below, [0.0], above])) / above[0]


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp('published')
    save_checkpoint(directory)
    yield directory
    load.cache_clear()
    own_logits.cache_clear()


@functools.cache
def load(directory, name, *sizes, lora=None):
    """The policy and its collections, with new adapters if `lora` is not None."""
    mesh = mesh_of(*sizes)
    policy, _, variables = policies.load_policy(directory, mesh, quantize=name)
    return with_adapters(policy, variables, lora, 0, mesh)


def inputs():
    tokens = np.random.default_rng(1).integers(0, 200, (8, 9)).astype(np.int32)
    valid = np.ones((8, 9), bool)
    valid[1, :4] = False
    return tokens, valid


@partial(jax.jit, static_argnums=0)
def apply(config, variables, tokens, valid):
    return Transformer(config).apply(variables, tokens, valid)


@functools.cache
def own_logits(directory, name):
    """The logits of a policy as it is loaded, on one device."""
    return logits(*load(directory, name))


def logits(policy, variables, mesh=None):
    """One program for all tests of one configuration on one mesh."""
    with jax.set_mesh(mesh or mesh_of()):
        return np.asarray(apply(policy.config, variables, *inputs()))


def by_hand(kernel, name):
    """Codes, scales and values [layers, in, out] of a stored kernel, computed in numpy."""
    codes = np.asarray(kernel.qvalue).astype(np.int32)
    tile = codes.shape[1] // kernel.scale.shape[1]
    scale = np.repeat(np.asarray(kernel.scale), tile, axis=1)
    return codes, scale, (nf4_levels()[codes] if name == 'nf4' else codes) * scale


@pytest.mark.parametrize('name', FORMATS)
def test_kernels_and_nothing_else_are_within_half_a_step_of_what_was_published(published, name):
    _, _, original = weights.load_checkpoint(published)
    _, variables = load(published, name)
    stored = variables['params']
    for path, leaf in jax.tree_util.tree_leaves_with_path(original):
        stored_leaf = stored
        for key in path:
            stored_leaf = stored_leaf[key.key]
        if path[-1].key != 'kernel':
            assert_array_equal(stored_leaf, leaf)
            continue
        codes, scale, values = by_hand(stored_leaf, name)
        tile = TILES[name][leaf.shape[1] == 160]
        assert stored_leaf.scale.shape == (2, leaf.shape[1] // tile, leaf.shape[2])
        tiles = leaf.reshape(2, -1, tile, leaf.shape[2])
        largest = np.repeat(np.abs(tiles).max(2), tile, axis=1)
        assert_allclose(scale, largest / {'int8': 127.5, 'int4': 7.5, 'nf4': 1}[name], rtol=1e-6)
        if name == 'nf4':
            levels = nf4_levels()
            above = np.clip(np.searchsorted(levels, leaf / scale), 1, 15)
            step = levels[above] - levels[above - 1]
        else:
            step = 1
        assert np.all(np.abs(values - leaf) <= (step / 2 + 1e-4) * scale)
        # Nearly all codes occur, so the format really uses all of its bits.
        assert len(np.unique(codes)) > 0.9 * 2 ** BITS[name]


@pytest.mark.parametrize('name', ['int8', 'nf4'])
def test_it_acts_as_its_dequantised_kernels_in_an_ordinary_model(published, name):
    """The codes of int4 are read as those of int8, and its tiles are those of nf4."""
    policy, variables = load(published, name)
    plain, original = load(published, '')
    params = dict(original['params'])
    params['layers'] = dict(params['layers'])
    for target in TARGETS:
        values = by_hand(variables['params']['layers'][target]['kernel'], name)[2]
        # Where the kernel lies that it replaces, so that the plain model needs one program.
        where = original['params']['layers'][target]['kernel'].sharding
        params['layers'][target] = {'kernel': jax.device_put(values.astype(np.float32), where)}
    expected = logits(plain, {'params': params})
    assert_allclose(own_logits(published, name), expected, atol=1e-5)
    assert np.abs(expected - own_logits(published, '')).max() > 1e-3


def test_meshes_agree_and_every_device_has_its_share(published):
    """The mesh divides the tiles of some kernels of nf4 and not those of others; int8 has one tile,
    and int4 has those of nf4. tests/models/test_families.py has int8 on a mesh."""
    name = 'nf4'
    policy, variables = load(published, name)
    mesh = mesh_of(2, 2, 2)
    _, spread = load(published, name, 2, 2, 2)
    jax.tree.map(assert_array_equal, jax.device_get(spread), jax.device_get(variables))
    assert_allclose(logits(policy, spread, mesh), own_logits(published, name), atol=1e-5)
    plain = Transformer(dataclasses.replace(policy.config, quantize=''))
    expected = sharding.param_shardings(plain, mesh)['layers']
    for target in TARGETS:
        kernel, where = spread['params']['layers'][target]['kernel'], expected[target]['kernel']
        assert kernel.qvalue.sharding == where
        assert kernel.qvalue.addressable_shards[0].data.size == kernel.qvalue.size // 4
        assert kernel.scale.sharding.spec[2] == where.spec[2]


def test_only_adapters_learn_and_they_start_from_the_base_itself(published):
    _, variables = load(published, 'int8')  # the format that takes least to compile
    # One kernel of each layout, since each target is compiled anew.
    lora = dataclasses.replace(SIZES, targets=('query', 'down'))
    policy, adapted = load(published, 'int8', lora=lora)
    mesh = mesh_of()
    state = initial_state(adapted, optax.sgd(1.0), policy, mesh, average=False)
    assert set(state.trained) == {COLLECTION} and set(state.frozen) == {'params'}

    def loss(trained, frozen, plain):
        model = policy if plain is None else plain
        return jnp.mean(jnp.sin(model.hidden(frozen | trained, *inputs())))

    gradient = jax.jit(jax.grad(loss), static_argnums=2)(state.trained, state.frozen, None)
    # The first step changes B only: the gradient of A is 0 because B is, which adds nothing yet.
    for target in lora.targets:
        factors = gradient[COLLECTION]['layers'][target][ADAPTER]
        assert np.any(np.asarray(factors['b']) != 0) and not np.any(np.asarray(factors['a']))
    params = dict(variables['params'])
    params['layers'] = {
        layer: {'kernel': by_hand(value['kernel'], 'int8')[2].astype(np.float32)}
        if layer in TARGETS
        else value
        for layer, value in params['layers'].items()
    }
    plain = dataclasses.replace(policy, config=dataclasses.replace(policy.config, quantize=''))
    expected = jax.jit(jax.grad(loss), static_argnums=2)(state.trained, {'params': params}, plain)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-6), gradient, expected)


@pytest.mark.parametrize('remat', [False, True])
def test_the_backward_pass_keeps_no_dequantised_kernels(remat):
    """No float array that is saved for the backward pass has the shape of a layer's kernels."""
    config = TransformerConfig(20, 24, 3, 6, 2, 40, quantize='nf4', remat=remat, lora=SIZES)
    policy = Policy(config, 0, 1, np.ones(20, bool))
    variables = {
        name: sharding.abstract_params(policy.model, collection=name)
        for name in ('params', COLLECTION)
    }

    def pull_back(variables):
        def forward(lora):
            return policy.hidden(variables | {COLLECTION: lora}, *inputs())

        return jax.vjp(forward, variables[COLLECTION])[1]

    leaves = jax.tree.leaves(jax.eval_shape(pull_back, variables))
    saved = {(leaf.shape, leaf.dtype.name) for leaf in leaves}
    kernels = {variables['params']['layers'][target]['kernel'].shape for target in TARGETS}
    assert not saved & {(shape, 'float32') for shape in kernels}
    assert saved & {(shape, 'uint4') for shape in kernels}  # the codes, to dequantise again


@pytest.mark.parametrize('name', FORMATS)
def test_a_base_takes_the_bytes_of_its_format(published, name):
    """In addition there is a float32 scale for each tile of a column."""
    _, variables = load(published, name)
    kernels = {target: variables['params']['layers'][target]['kernel'] for target in TARGETS}
    sizes = [(64, 64)] * 4 + [(64, 160)] * 2 + [(160, 64)]
    weights = 2 * sum(rows * columns for rows, columns in sizes)
    scales = 2 * sum(rows // TILES[name][rows == 160] * columns for rows, columns in sizes)
    assert local_bytes(kernels) == weights * BITS[name] // 8 + 4 * scales
    assert local_bytes(kernels) < 4 * weights * {'int8': 0.27, 'int4': 0.16, 'nf4': 0.16}[name]


def test_a_policy_trained_here_is_quantised_when_it_is_read(tmp_path):
    tokenizer = WordTokenizer(['1', '2', '+', ':', 'x'])
    config = TransformerConfig(tokenizer.size, 16, 2, 4, 2, 24)
    policy = policies.make_policy(config, tokenizer)
    params = random_params(policy.model)
    policies.save_policy(tmp_path / 'policy', {'params': params}, config, tokenizer, {})
    _, variables = load(tmp_path / 'policy', 'int4')
    kernel = variables['params']['layers']['gate']['kernel']
    values = by_hand(kernel, 'int4')[2]
    assert_allclose(values, params['layers']['gate']['kernel'], atol=0.1)
    assert_array_equal(variables['params']['embedding'], params['embedding'])


def test_one_tensor_at_a_time_is_in_full_precision(published, monkeypatch):
    """While a checkpoint is read, at most one kernel is in floating point."""
    float_kernels = []
    earlier_arrays = {id(x) for x in jax.live_arrays()}

    def recording_wait(x):
        kernels = [
            x
            for x in jax.live_arrays()
            if id(x) not in earlier_arrays and x.dtype == np.float32 and x.shape[-2:] in SHAPES
        ]
        float_kernels.append(len(kernels))
        return wait(x)

    wait = jax.block_until_ready
    monkeypatch.setattr(jax, 'block_until_ready', recording_wait)
    load.__wrapped__(published, 'int8')
    assert max(float_kernels) == 1 and float_kernels.count(1) == 2 * 7  # layers, kernels


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'model.quantize': 'fp4'}, "model.quantize is 'fp4'; use one of int8, int4, nf4, or ''"),
        (
            {'model.quantize': 'nf4', 'lora.rank': 0},
            "model.quantize is 'nf4' with lora.rank 0, which trains every parameter; .* use lora",
        ),
        ({'model.quantize': 'int4', 'lora.rank': 8}, None),
    ],
)
def test_what_cannot_be_is_refused(change, said):
    config = countdown.get_config('tiny')
    config.update_from_flattened_dict(change)
    if said is None:
        assemble(config)
        return
    with pytest.raises(ValueError, match=said) as error:
        assemble(config)
    assert '\n' not in str(error.value)


def test_without_qwix_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"qwix is not installed; pip install -e '.\[quantize\]'"):
        check_format('int8')
    check_format('')


def test_pretraining_ignores_the_format_of_frozen_bases(tmp_path):
    """A task has the same base, in full precision, for every format."""
    config = countdown.get_config('tiny')
    config.base.cache = str(tmp_path)
    plain = base_directory(config)
    config.model.quantize, config.lora.rank = 'int8', 2
    assert base_directory(config) == plain
    config.base.number_features = False  # Their embedding is computed on the host.
    started = []

    def variables_of_start():
        policy, _, variables = _starting_point(config, assemble(config), mesh_of(), None)
        started.append(policy)
        return variables

    variables = jax.eval_shape(variables_of_start)
    assert started[0].config.quantize == ''
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {'float32'}
