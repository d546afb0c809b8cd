"""Adapters change nothing at first, act like merged kernels, and are the only trained part."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.models.layers import RMSNorm, rotary_table
from spg_jax.models.lora import ADAPTER, COLLECTION, TARGETS, Adapter, LoRA, merged_kernel
from spg_jax.models.policy import Policy, with_adapters
from spg_jax.models.transformer import Block, Transformer, TransformerConfig
from spg_jax.models.windows import Window
from spg_jax.sharding import abstract_params
from tests.meshes import mesh_of
from tests.parameters import random_params

pytestmark = pytest.mark.numerical

CONFIG = TransformerConfig(vocab_size=20, width=24, layers=2, heads=6, kv_heads=2, mlp_width=40)
SIZES = LoRA(rank=4, alpha=6.0)


@functools.cache
def adapted(lora=SIZES):
    """A policy without adapters, the same with new adapters, and the collections of the latter."""
    plain = Policy(CONFIG, mask_id=0, eos_id=1, allowed=np.ones(20, bool))
    variables = {'params': random_params(plain.model)}
    return plain, *with_adapters(plain, variables, lora, 1, mesh_of())


def noisy(variables):
    """The same collections with random factors instead of the initial ones.

    The columns of a factor are about as long as a vector of ones, so that what adapters add has the
    size of what they are added to, and layers do not amplify rounding errors.
    """
    rng = np.random.default_rng(2)

    def noise(x):  # [layers, in, out]
        values = rng.normal(size=x.shape) / np.sqrt(x.shape[-2])
        return values.astype(np.float32)

    return variables | {COLLECTION: jax.tree.map(noise, variables[COLLECTION])}


def with_noise(plain, variables, lora):
    """The policy with random adapters; an init of adapters would be compiled for each size."""
    policy = dataclasses.replace(plain, config=dataclasses.replace(plain.config, lora=lora))
    shapes = abstract_params(policy.model, collection=COLLECTION)
    return policy, noisy(variables | {COLLECTION: shapes})


@functools.cache
def dropping():
    plain, _, variables = adapted()
    return with_noise(plain, {'params': variables['params']}, DROPPING)


def inputs():
    tokens = np.random.default_rng(1).integers(0, 19, (8, 9)).astype(np.int32)
    valid = np.ones((8, 9), bool)
    valid[1, :4] = False
    return tokens, valid


@partial(jax.jit, static_argnums=0)
def hidden(config, variables, *inputs):
    return Transformer(config).apply(variables, *inputs, method='hidden')


def run(policy, variables, *dropout):
    """One program for all tests of one configuration."""
    return np.asarray(hidden(policy.config, variables, *inputs(), *dropout))


def test_new_adapters_change_nothing_at_all():
    plain, policy, variables = adapted()
    before = run(plain, {'params': variables['params']})
    # An accelerator may compute the products of two programs by different kernels.
    tolerance = 0 if jax.devices()[0].platform == 'cpu' else 1e-5
    assert_allclose(run(policy, variables), before, rtol=0, atol=tolerance)
    factors = noisy(variables)
    assert np.abs(run(policy, factors) - before).max() > 0.1  # with others they act


def test_only_targets_have_adapters():
    _, policy, _ = adapted()
    lora = dataclasses.replace(SIZES, targets=('query', 'down'))
    config = dataclasses.replace(policy.config, lora=lora)
    shapes = abstract_params(Transformer(config), collection=COLLECTION)
    assert set(shapes['layers']) == {'query', 'down'}


def test_adapters_act_as_kernels_with_their_product_added():
    """Compares with a model without adapters, whose kernels are summed in numpy layer by layer."""
    (plain, policy, variables), targets = adapted(), TARGETS
    variables = noisy(variables)
    assert set(variables[COLLECTION]['layers']) == set(targets)
    summed = jax.tree.map(np.array, variables['params'])
    for target in targets:
        factors = variables[COLLECTION]['layers'][target][ADAPTER]
        for layer in range(CONFIG.layers):
            product = np.asarray(factors['a'][layer]) @ np.asarray(factors['b'][layer])
            summed['layers'][target]['kernel'][layer] += 6.0 / 4 * product
    expected = run(plain, {'params': summed})
    assert_allclose(run(policy, variables), expected, atol=2e-5)
    for target in targets:
        kernel = variables['params']['layers'][target]['kernel']
        factors = variables[COLLECTION]['layers'][target][ADAPTER]
        merged = merged_kernel(kernel, factors, policy.config.lora)
        assert_allclose(merged, summed['layers'][target]['kernel'], atol=1e-5)


def test_dropout_drops_its_share_and_keeps_the_mean():
    """With A and B the identity, an adapter's output is its input after dropout, scaled."""
    lora = LoRA(rank=50, alpha=50.0, dropout=0.3)
    adapter = Adapter(50, ('embed', 'heads'), lora, 'query')
    eye = {COLLECTION: {'a': jnp.eye(50), 'b': jnp.eye(50)}}
    keys = jax.random.split(jax.random.key(0), (4, 60))
    apply, ones = jax.jit(adapter.apply), np.ones((4, 60, 50), np.float32)
    out = np.asarray(apply(eye, ones, keys))
    assert set(np.unique(out).round(4)) == {0.0, np.float32(1 / 0.7).round(4)}
    assert_allclose(np.mean(out == 0, axis=(1, 2)), 0.3, atol=0.03)
    assert_array_equal(apply(eye, ones), ones)
    # What is dropped depends on the key of a token and not on its position, and differs between
    # tokens and between targets.
    reversed_out = apply(eye, ones, keys[::-1, ::-1])
    assert_array_equal(reversed_out, out[::-1, ::-1])
    assert len(np.unique(out.reshape(-1, 50), axis=0)) == 240
    other = jax.jit(Adapter(50, ('embed', 'heads'), lora, 'key').apply)(eye, ones, keys)
    assert (other != out).any(axis=(1, 2)).all()


# One kernel of each layout: the masks of all seven are most of what compiling would cost.
DROPPING = dataclasses.replace(SIZES, dropout=0.5, targets=('query', 'down'))


def test_every_layer_drops_by_a_key_of_its_own():
    """Compares with a plain loop over the layers, each with its keys split from those of rows."""
    (policy, variables), (tokens, valid) = dropping(), inputs()
    keys = jax.random.split(jax.random.key(5), 8)
    config = policy.config
    x = np.asarray(variables['params']['embedding'])[tokens]
    rotary = jax.jit(rotary_table, static_argnums=(1, 2))(valid, config.head_dim, config.rope_theta)
    position = np.maximum(np.cumsum(valid, axis=1) - 1, 0)  # inputs are padded on the left

    @jax.jit
    def split_keys(keys, position):
        token_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, position)
        return jax.vmap(jax.vmap(lambda key: jax.random.split(key, config.layers)))(token_keys)

    split = split_keys(keys, position)
    block = jax.jit(Block(config).apply)
    for layer in range(config.layers):
        of_layer = jax.tree.map(
            lambda x, i=layer: np.asarray(x)[i],
            {name: variables[name]['layers'] for name in variables},
        )
        x, _ = block(of_layer, x, rotary, valid, split[:, :, layer], None, None)
    norm = RMSNorm(config.norm_eps)
    x = jax.jit(norm.apply)({'params': variables['params']['final_norm']}, x)
    assert_allclose(run(policy, variables, keys), x, atol=2e-5)


def test_more_padding_drops_the_same():
    (policy, variables), (tokens, valid) = dropping(), inputs()
    keys = jax.random.split(jax.random.key(5), 8)
    padded = [np.pad(x, ((0, 0), (3, 0))) for x in (tokens, valid)]
    actual = np.asarray(hidden(policy.config, variables, *padded, keys))[:, 3:]
    expected = run(policy, variables, keys)
    other = run(policy, variables, keys[::-1])
    assert np.abs(expected - other)[valid].max() > 0.1  # dropout acts
    assert_allclose(actual[valid], expected[valid], atol=2e-5)


def test_a_window_has_the_states_and_the_gradients_of_the_whole_row():
    """Of kernels and adapters, with dropout; layers are recomputed in a loop, or unrolled, which
    differentiates no other code."""
    config = dataclasses.replace(CONFIG, layers=3, kv_heads=3, tie_embeddings=True)
    plain = Policy(config, mask_id=0, eos_id=1, allowed=np.ones(20, bool))
    params = {'params': random_params(plain.model)}
    lora = dataclasses.replace(DROPPING, targets=('query',))
    policy, variables = with_noise(plain, params, lora)
    (tokens, valid), keys = inputs(), jax.random.split(jax.random.key(5), 8)
    window = Window(5, 3)

    def outcome(derive, in_window, **changes):
        changed = dataclasses.replace(policy.config, **changes)
        hidden = dataclasses.replace(policy, config=changed).hidden

        def loss(variables):
            if in_window:
                states = hidden(variables, tokens, valid, keys, window)
            else:
                states = window.cut(hidden(variables, tokens, valid, keys))
            return jnp.sin(states).sum(), states

        return jax.jit(derive(loss, has_aux=True))(variables)

    expected, expected_states = outcome(jax.grad, False)
    actual, states = outcome(jax.grad, True, remat=True, attention='folded')
    assert_allclose(states, expected_states, atol=2e-5)
    for leaf, expected_leaf in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        largest = np.abs(expected_leaf).max()
        assert largest > 1e-3
        assert_allclose(leaf, expected_leaf, rtol=0, atol=1e-5 * largest)
    _, states = outcome(lambda loss, has_aux: loss, True, scan_unroll=3)
    assert_allclose(states, expected_states, atol=2e-5)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'rank': -1}, 'lora.rank is -1'),
        ({'alpha': 0.0}, 'lora.alpha is 0.0'),
        ({'dropout': 1.0}, 'lora.dropout is 1.0'),
        ({'targets': ('query', 'o_proj')}, 'o_proj'),
        ({'targets': ()}, 'lora.targets'),
        ({'targets': ('up', 'up')}, 'lora.targets'),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **change)


def test_a_policy_keeps_the_adapters_it_has_and_refuses_others():
    _, policy, variables = adapted()
    same, kept = with_adapters(policy, variables, SIZES, 7, mesh_of())
    assert same is policy and kept is variables
    with pytest.raises(ValueError, match='adapters of rank 4, .* asks for rank 8; set .*rank=4,'):
        with_adapters(policy, variables, dataclasses.replace(SIZES, rank=8), 7, mesh_of())
    with pytest.raises(ValueError, match='asks for none; set .*rank=4 .*alpha=6.0 '):
        with_adapters(policy, variables, None, 7, mesh_of())
