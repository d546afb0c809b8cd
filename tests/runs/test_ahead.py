"""Programs that are compiled in a thread: compiled once, with the result of the program itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg_jax.runs.ahead import compiled_ahead
from spg_jax.sharding import put_batch
from tests.meshes import mesh_of

pytestmark = pytest.mark.fast


def test_a_program_is_traced_once_and_compiled_before_its_call():
    mesh, traces = mesh_of(2, 1, 1), []

    @jax.jit
    def program(x):
        traces.append(0)
        return 2 * x

    x = put_batch(mesh, np.arange(4.0, dtype=np.float32))
    with jax.set_mesh(mesh):
        ahead = compiled_ahead(program, (x,), mesh)
        result = ahead(x)
        np.testing.assert_array_equal(result, [0, 2, 4, 6])
        assert ahead(x).sharding == x.sharding
    assert len(traces) == 1


def test_what_is_wrong_with_a_program_is_said_where_it_is_called():
    @jax.jit
    def program(x):
        raise ValueError('no such kernel')

    ahead = compiled_ahead(program, (jnp.zeros(2),), mesh_of())
    with pytest.raises(ValueError, match='no such kernel'):
        ahead(jnp.zeros(2))
