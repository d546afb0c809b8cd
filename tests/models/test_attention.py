"""Every implementation of attention against a loop over the formula, on one device and on a mesh.

The kernel for TPUs is interpreted here. Without CUDA, the portable implementation of the function
that calls the kernel for CUDA runs on the same arguments.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax import sharding
from spg_jax.models.attention import _IMPLEMENTATIONS as implementations
from spg_jax.models.attention import attention, cudnn_attention, resolve
from spg_jax.models.splash import splash_attention
from spg_jax.models.transformer import Transformer, TransformerConfig
from tests.meshes import mesh_of
from tests.parameters import random_params

pytestmark = pytest.mark.numerical

CUDA = jax.devices()[0].platform == 'gpu'
HERE = {  # implementation -> the form of it that runs here
    'einsum': partial(attention, implementation='einsum'),
    'folded': partial(attention, implementation='folded'),
    'splash': partial(splash_attention, interpret=True),
    'cudnn': partial(cudnn_attention, implementation='cudnn' if CUDA else 'xla'),
}
PRECISE = ('einsum', 'folded', 'splash')  # implementations that also compute in float32


def inputs(L, N, K, dtype='float32', H=4, pads=(0, 3, 0, 1)):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(len(pads), L, n, H)) for n in (N, K, K))
    # Padding holds values of another magnitude, which must not count.
    valid = np.arange(L)[None, :] >= np.asarray(pads)[:, None]
    k, v = (np.where(valid[:, :, None, None], x, 30 * x) for x in (k, v))
    return *(x.astype(jnp.dtype(dtype)) for x in (q, k, v)), valid


def loop(q, k, v, valid):
    """Attention row by row, head by head and query by query, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for row, position, head in np.ndindex(q.shape[:3]):
        real, kv_head = np.asarray(valid[row]), head // (q.shape[2] // k.shape[2])
        weights = np.exp(k[row, real, kv_head] @ q[row, position, head] / np.sqrt(q.shape[3]))
        out[row, position, head] = weights / weights.sum() @ v[row, real, kv_head]
    return out


@partial(jax.jit, static_argnums=0)
def weighted_outcome(implementation, qkv, valid, weights):
    def weighted(qkv):
        mixed = HERE[implementation](*qkv, valid)
        return jnp.sum(mixed.astype(jnp.float32) * weights), mixed

    (_, mixed), gradients = jax.value_and_grad(weighted, has_aux=True)(qkv)
    return mixed, gradients


def outcome(implementation, q, k, v, valid):
    """The output, and the gradients of a sum that weighs every entry differently; one program for
    all tests of one implementation and shape."""
    weights = np.random.default_rng(1).normal(size=q.shape)
    return weighted_outcome(implementation, (q, k, v), valid, weights)


@pytest.mark.fast
@pytest.mark.parametrize(
    ('implementation', 'N', 'K'),
    [('einsum', 4, 2), ('folded', 4, 2), ('splash', 3, 1), ('cudnn', 4, 2)],
)
def test_output_is_the_formula(implementation, N, K):
    """The length is odd, although cuDNN accepts even lengths only.

    Other tests of this file have splash with several keys. tests/models/test_transformer.py has
    one key for all queries, and a key for every query.
    """
    exact = implementation in PRECISE
    arrays = inputs(7, N, K, 'float32' if exact else 'bfloat16')
    mixed = jax.jit(HERE[implementation])(*arrays)
    assert (mixed.shape, mixed.dtype) == (arrays[0].shape, arrays[0].dtype)
    tolerance = {'atol': 2e-6} if exact else {'rtol': 2**-7, 'atol': 2**-7}
    assert_allclose(np.asarray(mixed, np.float64), loop(*arrays), **tolerance)


@pytest.mark.parametrize('implementation', ['splash', 'folded'])
def test_gradients_equal_those_of_the_formula(implementation):
    """Compares with differences of the loop along a direction, and with einsum entry by entry."""
    arrays = inputs(5, 4, 2)
    _, gradients = outcome(implementation, *arrays)
    _, expected = outcome('einsum', *arrays)
    jax.tree.map(partial(assert_allclose, atol=5e-6), gradients, expected)

    weights = np.random.default_rng(1).normal(size=arrays[0].shape)
    exact = [np.asarray(x, np.float64) for x in arrays[:3]]
    rng = np.random.default_rng(2)
    directions = [rng.normal(size=x.shape) for x in exact]

    def weighted_sum_at(step):
        point = (x + step * d for x, d in zip(exact, directions, strict=True))
        return np.sum(weights * loop(*point, arrays[3]))

    slope = sum(np.sum(np.asarray(g) * d) for g, d in zip(gradients, directions, strict=True))
    difference = weighted_sum_at(1e-5) - weighted_sum_at(-1e-5)
    assert_allclose(slope, difference / 2e-5, rtol=1e-5)


@pytest.mark.parametrize('implementation', ['splash', 'cudnn'])
def test_bfloat16_on_a_mesh_equals_einsum_on_one_device(implementation):
    """Rows are split over data and fsdp, query and key/value heads over tensor."""
    q, k, v, valid = inputs(7, 4, 2, 'bfloat16')
    expected = outcome('einsum', q, k, v, valid)
    mesh = mesh_of(2, 2, 2)
    heads = jax.NamedSharding(mesh, jax.P(sharding.ROWS, None, 'tensor'))
    with jax.set_mesh(mesh):
        actual = outcome(implementation, *jax.device_put((q, k, v), heads), valid)
    if implementation == 'splash':
        assert actual[0].sharding.is_equivalent_to(heads, 4)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype == jnp.bfloat16
        # Both round weights or sums of weights to 8 bits, but at different steps.
        tolerance = {'rtol': 2**-6, 'atol': 2**-6 * np.abs(np.asarray(y, np.float64)).max()}
        assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), **tolerance)


@pytest.mark.parametrize('implementation', HERE)
def test_a_row_of_padding_is_finite(implementation):
    """The arrays have the shapes of tests above, whose programs serve here again."""
    if implementation in PRECISE:
        arrays = inputs(5, 4, 2, pads=(5, 3, 0, 5))
    else:
        arrays = inputs(7, 4, 2, 'bfloat16', pads=(7, 3, 0, 7))
    assert all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome(implementation, *arrays))
    )


def test_splash_in_the_transformer_on_a_mesh_equals_einsum_on_one_device(monkeypatch):
    """Covers the scan over layers, and a trace of the init, which is of one row."""
    interpreted = partial(splash_attention, interpret=True)
    monkeypatch.setitem(implementations, 'splash', interpreted)
    sizes = {'width': 16, 'layers': 2, 'heads': 4, 'kv_heads': 2, 'mlp_width': 8}
    tokens = np.random.default_rng(0).integers(0, 12, (4, 6))
    valid = np.arange(6)[None, :] >= np.asarray([[0], [2], [0], [5]])

    def gradient(mesh, implementation):
        model = Transformer(TransformerConfig(12, **sizes, attention=implementation))
        with jax.set_mesh(mesh):
            params = random_params(model, mesh=mesh)
            # As small as those of an init, so that gradients are too.
            params |= {name: params[name] / 4 for name in ('embedding', 'unembedding')}
            batch = sharding.put_batch(mesh, (tokens, valid))

            def loss(params):
                logits = model.apply({'params': params}, *batch)
                return jnp.sum(jax.nn.log_softmax(logits)[..., 3] * batch[1])

            return jax.device_get(jax.jit(jax.grad(loss))(params))

    expected = gradient(mesh_of(), 'einsum')
    actual = gradient(mesh_of(2, 2, 2), 'splash')
    jax.tree.map(partial(assert_allclose, atol=1e-5), actual, expected)


@pytest.mark.fast
def test_the_platform_decides():
    for platform, fastest in {'cpu': 'folded', 'tpu': 'splash', 'gpu': 'cudnn'}.items():
        assert resolve('auto', platform) == fastest
        assert resolve('einsum', platform) == 'einsum'
    assert resolve('auto', 'cuda') == 'cudnn'
    assert resolve('auto', 'gpu', 'float32') == 'einsum'  # cuDNN does not compute in float32
    assert resolve('auto', 'tpu', 'float32') == 'splash'


def test_impossible_implementations_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="'metal'; use einsum"):
        resolve('auto', 'metal')
    with pytest.raises(ValueError, match="'flash', perhaps splash; use one of auto, einsum"):
        resolve('flash', 'cpu')
    with pytest.raises(ValueError, match='bfloat16, not float32; use model.attention einsum'):
        attention(*inputs(4, 2, 2), 'cudnn')


def test_the_message_without_cudnn_says_what_to_use(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError('cuDNN is not detected.')

    monkeypatch.setattr(jax.nn, 'dot_product_attention', refuse)
    q, k, v, valid = inputs(4, 2, 2)
    with pytest.raises(ValueError, match='cuDNN is not detected. .* use model.attention einsum'):
        attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), valid, 'cudnn')
