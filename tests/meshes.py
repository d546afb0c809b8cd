"""Meshes over some of the 8 virtual devices, or over what an accelerator has."""

import math

import jax
import pytest
from jax.sharding import Mesh

from spg_jax import sharding


def mesh_of(*sizes: int) -> Mesh:
    """The first devices as data x fsdp x tensor; one device unless told.

    Skips the test where there are too few, which only accelerators can have.
    """
    sizes = sizes or (1, 1, 1)
    if math.prod(sizes) > len(jax.devices()) and jax.devices()[0].platform != 'cpu':
        pytest.skip(f'{math.prod(sizes)} devices are needed')
    return sharding.make_mesh(
        dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)]
    )
