"""Meshes give the same parameters and gradients, and really split them over their devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax import sharding
from spg_jax.models.transformer import Transformer, TransformerConfig
from tests.meshes import mesh_of

CONFIG = TransformerConfig(vocab_size=24, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32)


@pytest.fixture(scope='module')
def alone():
    """The parameters, gradient and logits of one device, from an unsharded init of Flax."""
    variables = jax.jit(Transformer(CONFIG).init)(
        jax.random.key(3), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    )
    is_box = sharding._is_box
    params = jax.tree.map(lambda box: box.value, variables['params'], is_leaf=is_box)
    return outcome(mesh_of(), params)


def outcome(mesh, params=None):
    model = Transformer(CONFIG)
    tokens = np.random.default_rng(0).integers(0, 24, (8, 6)).astype(np.int32)

    def loss(params, tokens):
        logits = model.apply({'params': params}, tokens, jnp.ones(tokens.shape, bool))
        return jnp.mean(jax.nn.log_softmax(logits)[:, :, 3]), logits

    with jax.set_mesh(mesh):
        if params is None:
            params = sharding.init_params(model, jax.random.key(3), mesh)
        grad = jax.jit(jax.grad(loss, has_aux=True))
        gradient, logits = grad(params, sharding.put_batch(mesh, tokens))
    return params, gradient, logits


@pytest.fixture(scope='module')
def spread():
    return outcome(mesh_of(2, 2, 2))


def test_a_mesh_gives_the_same_numbers(spread, alone):
    """Compares parameters, gradient and logits.

    tests/test_going_on.py compares whole trainings, on more meshes.
    """
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), spread, alone)


def test_parameters_equal_an_unsharded_flax_init(spread, alone):
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-6), spread[0], alone[0])


def test_parameters_are_split_as_the_rules_say(spread):
    params, _, logits = spread
    shards = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.shape, params)
    assert shards['embedding'] == (12, 8)
    assert shards['unembedding'] == (8, 12)
    assert shards['layers']['query']['kernel'] == (2, 8, 8)
    assert shards['layers']['key']['kernel'] == (2, 8, 4)
    assert shards['layers']['attention_out']['kernel'] == (2, 8, 8)
    assert shards['layers']['down']['kernel'] == (2, 16, 8)
    assert shards['layers']['mlp_norm']['scale'] == (2, 16)
    # Rows are split and not copied: the pinned layout of activations reaches the logits.
    assert logits.addressable_shards[0].data.shape[0] == 2
    per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert per_device < 0.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_axes_are_auto_and_the_open_one_takes_what_is_left():
    mesh = sharding.make_mesh({'fsdp': -1, 'tensor': 2})
    assert dict(mesh.shape) == {'data': 1, 'fsdp': 4, 'tensor': 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        ({'data': 3}, 'mesh data=3 x fsdp=1 x tensor=1 needs 3 devices, 8 devices found; set one'),
        ({'data': -1, 'fsdp': 3}, '8 devices found, not a multiple of 3'),
        ({'data': -1, 'fsdp': -1}, 'mesh.data and mesh.fsdp are both -1'),
        ({'data': 0}, 'mesh.data is 0'),
        ({'model': 8}, 'mesh.model is not a mesh axis; use data, fsdp, tensor'),
    ],
)
def test_impossible_meshes_say_what_to_use(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_contradicting_rules_name_the_tensor_and_both_axes(monkeypatch):
    monkeypatch.setitem(sharding.RULES, 'embed', 'tensor')
    message = "embedding: logical axes 'vocab' and 'embed' both map to mesh axis 'tensor'"
    with pytest.raises(ValueError, match=message):
        sharding.param_shardings(Transformer(CONFIG), mesh_of(2, 2, 2))


def test_logical_axes_become_mesh_axes_by_the_rules():
    with pytest.raises(ValueError, match="x: logical axis 'head' has no rule"):
        sharding.partition_spec('x', ('head',))
    assert sharding.partition_spec('x', ('embed', None, 'layers')) == P('fsdp', None, None)


def test_a_dimension_the_mesh_does_not_divide_is_named():
    config = dataclasses.replace(CONFIG, vocab_size=25)
    with pytest.raises(ValueError, match='embedding: vocab is 25, not a multiple of mesh.tensor 2'):
        sharding.abstract_params(Transformer(config), mesh_of(2, 2, 2))


def test_batches_are_split_by_rows():
    mesh = mesh_of(2, 2, 2)
    batch = {'tokens': np.arange(24).reshape(8, 3), 'reward': np.arange(8.0)}
    placed = sharding.put_batch(mesh, batch)
    jax.tree.map(assert_array_equal, placed, batch)
    assert placed['tokens'].sharding == sharding.batch_sharding(mesh)
    assert {shard.data.shape for shard in placed['tokens'].addressable_shards} == {(2, 3)}
    with pytest.raises(ValueError, match=r'shape \[6, 3\] .*data=2 x fsdp=2.*multiple of 4 rows'):
        sharding.put_batch(mesh, batch['tokens'][:6])
    copied = jax.device_put(np.arange(3), sharding.replicated(mesh))
    assert {shard.data.shape for shard in copied.addressable_shards} == {(3,)}


def test_rows_are_pinned_only_where_that_is_possible():
    mesh = mesh_of(2, 2, 2)
    pin = jax.jit(lambda x: sharding.constrain(x, 'rows', None))
    rows = jnp.zeros((8, 4))
    assert pin(rows).sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        assert pin(rows).addressable_shards[0].data.shape == (2, 4)
        assert pin(jnp.zeros((6, 4))).shape == (6, 4)
