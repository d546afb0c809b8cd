"""The transformer against a plain-numpy forward written from the formulas, one row at a time."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax import sharding
from spg_jax.models.attention import attention
from spg_jax.models.layers import WIDE, RMSNorm, product, rotary_table, rotate
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.models.windows import Window
from tests.meshes import mesh_of
from tests.parameters import random_params

pytestmark = pytest.mark.numerical

CONFIG = TransformerConfig(
    vocab_size=19,
    width=24,
    layers=2,
    heads=6,
    kv_heads=2,
    mlp_width=40,
    rope_theta=100.0,
    tie_embeddings=True,
    scale_logits=True,
)


def make(config=CONFIG):
    """Parameters as large as initial ones, or larger, let every term of the formula show."""
    return random_params(Transformer(config))


@partial(jax.jit, static_argnames=('config', 'method'))
def run(params, *args, config=CONFIG, method='__call__'):
    return Transformer(config).apply({'params': params}, *args, method=method)


def inputs():
    tokens = np.random.default_rng(1).integers(0, 19, (3, 9)).astype(np.int32)
    valid = np.ones((3, 9), bool)
    valid[1, :4] = False
    return jnp.asarray(tokens), jnp.asarray(valid)


def numpy_row(params, tokens, config):
    """Logits [n, V] of one row without padding, by heads and positions, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    H, share = config.width // config.heads, config.heads // config.kv_heads

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotated(x, position):
        pairs = x[: H // 2] + 1j * x[H // 2 :]
        pairs = pairs * np.exp(1j * position * config.rope_theta ** (-np.arange(H // 2) * 2 / H))
        return np.concatenate([pairs.real, pairs.imag])

    x = params['embedding'][tokens]
    for layer in range(config.layers):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params['layers'])
        h = norm(x, p['attention_norm']['scale'])
        q, k, v = (h @ p[name]['kernel'] for name in ('query', 'key', 'value'))
        mixed = np.zeros((len(tokens), config.width))
        for head in range(config.heads):
            query_head = slice(head * H, (head + 1) * H)
            kv_head = slice(head // share * H, (head // share + 1) * H)
            for i in range(len(tokens)):
                scores = [
                    rotated(q[i, query_head], i) @ rotated(k[j, kv_head], j) / np.sqrt(H)
                    for j in range(len(tokens))
                ]
                weights = np.exp(scores - np.max(scores))
                mixed[i, query_head] = weights / weights.sum() @ v[:, kv_head]
        x = x + mixed @ p['attention_out']['kernel']
        h = norm(x, p['mlp_norm']['scale'])
        gate = h @ p['gate']['kernel']
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p['up']['kernel'])) @ p['down']['kernel']
    x = norm(x, params['final_norm']['scale'])
    table = params['embedding'].T if config.tie_embeddings else params['unembedding']
    return x @ table * (config.width**-0.5 if config.scale_logits else 1)


@pytest.mark.fast
@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'attention': 'einsum', 'kv_heads': 1},
        {'tie_embeddings': False, 'scale_logits': False, 'kv_heads': 6},
    ],
    ids=['grouped-tied-scaled', 'einsum-one-key', 'untied-a-key-for-every-query'],
)
def test_logits_equal_the_formulas(changes):
    """Each case changes several things that do not meet in the code: attention sees no embedding.

    tests/models/test_attention.py compares the two implementations in more cases.
    """
    config = dataclasses.replace(CONFIG, **{'attention': 'folded'} | changes)
    params = make(config)
    tokens, valid = inputs()
    logits = np.asarray(run(params, tokens, valid, config=config))
    for row in range(3):
        real = np.asarray(valid[row])
        expected = numpy_row(params, np.asarray(tokens[row])[real], config)
        assert_allclose(logits[row, real], expected, atol=5e-5)


@pytest.mark.fast
def test_positions_count_from_the_first_valid_token():
    """Scores depend on differences of positions only, so this test looks at the rotary table."""
    _, valid = inputs()
    cos, sin = jax.jit(rotary_table, static_argnums=(1, 2))(valid, 4, 100.0)
    expected = np.arange(9)[:, None] * np.array([1, 0.1])[None, :]
    assert_allclose(sin[0], np.sin(expected), atol=1e-6)
    assert_allclose(cos[1, 4:], np.cos(expected[:5]), atol=1e-6)
    assert_allclose(sin[1, :5], 0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_of_wide_kernels_are_those_of_the_formulas(dtype):
    rng = np.random.default_rng(0)
    x, kernel, dy = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((2, 3, WIDE), (WIDE, WIDE + 1), (2, 3, WIDE + 1))
    )

    @jax.jit
    def gradients(x, kernel, dy):
        y, back = jax.vjp(lambda x, kernel: product(x, kernel, jnp.float32, True), x, kernel)
        return y, *back(dy.astype(jnp.float32))

    y, dx, dkernel = gradients(x, kernel, dy)
    x, kernel, dy = (np.asarray(value, np.float64) for value in (x, kernel, dy))
    bound = {'rtol': 1e-5, 'atol': 1e-4} if dtype == 'float32' else {'rtol': 1e-2, 'atol': 1e-2}
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.float32, dtype, dtype)
    assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-4)
    assert_allclose(np.asarray(dx, np.float64), dy @ kernel.T, **bound)
    assert_allclose(np.asarray(dkernel, np.float64), np.einsum('bli,blo->io', x, dy), **bound)


def test_a_wide_model_that_transposes_has_the_same_gradient_on_a_mesh():
    sizes = {'vocab_size': WIDE, 'width': WIDE, 'mlp_width': WIDE, 'heads': 4}
    plain = dataclasses.replace(CONFIG, **sizes)
    transposing = dataclasses.replace(plain, scan_unroll=plain.layers, attention='folded')
    assert transposing.transposes and not plain.transposes
    assert not dataclasses.replace(plain, attention='folded').transposes
    tokens = np.random.default_rng(1).integers(0, WIDE, (4, 6)).astype(np.int32)

    @partial(jax.jit, static_argnames='config')
    def gradient(params, config):
        def loss(params):
            logits = Transformer(config).apply({'params': params}, tokens, tokens >= 0)
            return jnp.sin(logits).sum()

        return jax.grad(loss)(params)

    mesh = mesh_of(2, 2, 2)
    params = sharding.init_params(Transformer(transposing), jax.random.key(0), mesh)
    expected = gradient(jax.device_get(params), plain)
    with jax.set_mesh(mesh):
        found = gradient(params, transposing)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_every_valid_token_reaches_every_position():
    """Attention is bidirectional: a change of any token changes the logits at each position."""
    params = make()
    tokens, valid = inputs()
    before = np.asarray(run(params, tokens, valid))
    for position in range(4, 9):
        changed = np.array(tokens)
        changed[1, position] = (changed[1, position] + 1) % 19
        moved = np.abs(np.asarray(run(params, changed, valid)) - before).max(-1)
        assert (moved[1, 4:] > 1e-4).all()
        assert_array_equal(moved[0], 0)


def test_a_pass_with_a_cache_is_the_same_in_a_loop_over_layers_and_for_a_window():
    """Positions 2 to 5 of 7 are read, and the states of 3 and 4 asked for or all."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 19, (3, 4)).astype(np.int32)
    valid = np.arange(7)[None, :] >= np.arange(3)[:, None]
    stacked = tuple(rng.normal(size=(2, 2, 3, 7, 2, 4)).astype(np.float32))  # keys and values

    @partial(jax.jit, static_argnames=('unroll', 'size'))
    def read(cache, start, unroll, size):
        transformer = Transformer(dataclasses.replace(CONFIG, scan_unroll=unroll))
        arguments = (tokens, valid, cache, jnp.int32(2), Window(start, size))
        return transformer.apply({'params': make()}, *arguments, method='hidden_with_cache')

    whole, expected = read(stacked, 0, unroll=1, size=4)
    of_layers = tuple(zip(*stacked, strict=True))
    for unroll, cache in ((1, stacked), (2, of_layers)):
        part, after = read(cache, 1, unroll=unroll, size=2)
        assert_allclose(part, whole[:, 1:3], atol=1e-5)
        after = after if unroll == 1 else tuple(map(np.stack, zip(*after, strict=True)))
        for ours, theirs in zip(after, expected, strict=True):
            assert_allclose(ours, theirs, atol=1e-5)


def test_unrolled_and_rematerialised_layers_give_equal_gradients():
    """Layers that keep what they compute, one after the other, and a loop that computes it again.

    The test of the formulas above has a loop that keeps it. The last row is all padding.
    """
    tokens, valid = inputs()
    valid = valid.at[2].set(False)
    params = make()

    def outcome(**changes):
        config = dataclasses.replace(CONFIG, **changes)

        def loss(params):
            logits = run(params, tokens, valid, config=config)
            # A row of padding counts as 0, and would make all of it NaN if it were not finite.
            return jnp.sum(jax.nn.log_softmax(logits)[:, :, 3] * valid)

        return jax.jit(jax.value_and_grad(loss))(params)

    unrolled, rematerialised = outcome(scan_unroll=2), outcome(remat=True)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(unrolled))
    assert np.abs(unrolled[1]['layers']['query']['kernel']).max() > 1e-3
    jax.tree.map(partial(assert_allclose, rtol=1e-4, atol=1e-5), unrolled, rematerialised)


def test_norms_rotary_softmax_and_logits_stay_float32_under_bfloat16():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 3, 8)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)

    # Positions 801 and 802 are the same bfloat16 number, so a rotation in bfloat16 is wrong here.
    table = jax.jit(rotary_table, static_argnums=(1, 2))
    cos, sin = map(np.asarray, table(np.ones((2, 805), bool), 8, 1e4))
    assert cos.dtype == sin.dtype == jnp.float32
    angle = np.arange(800, 805)[:, None] * 1e4 ** (-np.arange(4) / 4)
    assert_allclose(cos[0, 800:], np.cos(angle), atol=2e-4)
    rotated = jax.jit(rotate)(x, (cos[:, 800:], sin[:, 800:]))
    pairs = (exact[..., :4] + 1j * exact[..., 4:]) * np.exp(1j * angle)[None, :, None, :]
    assert rotated.dtype == jnp.bfloat16
    expected = np.concatenate([pairs.real, pairs.imag], -1)
    # Only the result is rounded, by half a unit in the last of 8 bits.
    assert_allclose(np.asarray(rotated, np.float64), expected, rtol=2**-8, atol=2e-3)

    norm = RMSNorm(1e-5, dtype='bfloat16')
    scale = 1 + 1e-3 * np.arange(8, dtype=np.float32)
    normed = jax.jit(norm.apply)({'params': {'scale': scale}}, x)
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * scale
    assert_allclose(np.asarray(normed, np.float64), expected, rtol=2**-8)

    config = dataclasses.replace(CONFIG, dtype='bfloat16')
    tokens, valid = inputs()
    params = make(config)
    hidden = run(params, tokens, valid, config=config, method='hidden')
    logits = run(params, hidden, config=config, method='unembed')
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    precise = run(params, tokens, valid)
    assert_allclose(logits, precise, atol=0.15)
    # Logits are not rounded to bfloat16.
    assert np.any(np.asarray(logits) != np.asarray(logits.astype(jnp.bfloat16), np.float32))


def test_softmax_of_close_bfloat16_scores_is_float32():
    """Scores 64 and 64.06 are the same bfloat16 number, but their weights differ by 6 %."""
    q = jnp.zeros((1, 2, 1, 4), jnp.bfloat16).at[..., :2].set(8)
    k = jnp.zeros((1, 2, 1, 4), jnp.bfloat16).at[..., 0].set(16).at[0, 1, 0, 1].set(1 / 64)
    v = jnp.zeros((1, 2, 1, 4), jnp.bfloat16).at[0, 1].set(1)
    expected = 1 / (1 + np.exp(-8 / 64 / 2))
    for implementation in ('folded', 'einsum'):
        attend = jax.jit(partial(attention, implementation=implementation))
        mixed = attend(q, k, v, np.ones((1, 2), bool))
        assert_allclose(np.asarray(mixed, np.float64), expected, rtol=2**-8)
        assert abs(expected - 0.5) > 2 * expected * 2**-8


@pytest.mark.parametrize(
    'changes', [{'tie_embeddings': False, 'scale_logits': False}, {'scale_logits': False}]
)
def test_initial_predictions_are_near_uniform(changes):
    wide = {'width': 96, 'heads': 4, 'kv_heads': 4, 'mlp_width': 256}
    config = dataclasses.replace(CONFIG, **wide, **changes)
    tokens, valid = inputs()
    model = Transformer(config)

    @jax.jit
    def entropies(key):
        logits, _ = model.init_with_output(key, tokens, valid)
        return -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)

    entropy = entropies(jax.random.key(0))
    assert entropy.mean() > np.log(19) - 0.6


@pytest.mark.fast
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'width': 25}, 'width 25 is not a multiple of model.heads 6; use width 30'),
        ({'kv_heads': 4}, 'heads 6 is not a multiple of model.kv_heads 4'),
        ({'width': 18}, 'head dim 3'),
        ({'layers': 0}, 'model.layers is 0'),
        ({'dtype': 'float16'}, "'float16', perhaps bfloat16; use one of float32, bfloat16"),
        ({'norm_eps': 0.0}, 'model.norm_eps is 0.0'),
        ({'attention': 'flash'}, "'flash', perhaps splash; use one of einsum"),
    ],
)
def test_impossible_configurations_say_what_to_use(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
