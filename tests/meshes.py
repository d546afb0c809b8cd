"""Meshes over some of the 8 virtual devices."""

import math

import jax
from jax.sharding import Mesh

from spg_jax import sharding


def mesh_of(*sizes: int) -> Mesh:
    """The first devices as data x fsdp x tensor; one device unless told."""
    sizes = sizes or (1, 1, 1)
    return sharding.make_mesh(
        dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)]
    )
