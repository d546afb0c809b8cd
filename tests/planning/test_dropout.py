"""What the compiler for TPUs makes of the dropout of adapters."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from spg_jax.models.lora import COLLECTION, Adapter, LoRA
from spg_jax.random import root_key

pytestmark = pytest.mark.compiled_as_users_do

ROWS, LENGTH, WIDTH, RANK = 4, 128, 256, 8


def test_random_bits_are_drawn_outside_of_products(slice_of_four):
    """A product with the draws in it takes minutes to compile at the size of LLaDA-8B.

    The draws are the only `xor` of an adapter, and products are convolutions on a TPU.
    """
    placed = SingleDeviceSharding(slice_of_four.devices[0])

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=placed)

    adapter = Adapter(WIDTH, ('embed', 'mlp'), LoRA(RANK, 1.0, dropout=0.05), 'query', 'bfloat16')
    factors = {COLLECTION: {'a': shape(WIDTH, RANK), 'b': shape(RANK, WIDTH)}}
    x = shape(ROWS, LENGTH, WIDTH, dtype=jnp.bfloat16)
    keys = shape(ROWS, LENGTH, dtype=root_key(0).dtype)
    text = jax.jit(adapter.apply).lower(factors, x, keys).compile().as_text()
    pattern = r'^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}'
    computations = re.findall(pattern, text, re.S | re.M)
    bodies = {name: body for _, name, body in computations}

    def operations(body):
        called = [operations(bodies[name]) for name in re.findall(r'calls=%([\w.\-]+)', body)]
        return set(re.findall(r' ([a-z\-]+)\(', body)).union(*called)

    (entry,) = (body for is_entry, _, body in computations if is_entry)
    fusions = [operations(bodies[name]) for name in re.findall(r'calls=%([\w.\-]+)', entry)]
    assert any('xor' in fusion for fusion in fusions)
    assert any('convolution' in fusion for fusion in fusions)
    assert not any({'xor', 'convolution'} <= fusion for fusion in fusions)
