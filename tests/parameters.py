"""Random parameters from NumPy, for tests that compare computations: an init takes seconds to
compile for each size of a model."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.sharding import abstract_params
from tests.meshes import mesh_of


def random_params(model: nn.Module, seed: int = 0, mesh: Mesh | None = None) -> Any:
    """The same values on every mesh: normal, and about as large as those of an init. Scales of
    norms lie around 1."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        values = rng.normal(size=leaf.shape)
        if name.endswith('scale'):
            values = 1 + 0.2 * values
        elif name.endswith('kernel'):
            values /= math.sqrt(leaf.shape[-2])
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model, mesh or mesh_of()))


def start_from_random_params(patch: pytest.MonkeyPatch) -> None:
    """Trainings from scratch start from `random_params`, so that no init is compiled.

    Adapters start as they do in a run, because their second factors are to be zero.
    """
    init_params = sharding.init_params

    def without_init(
        model: nn.Module, key: jax.Array, mesh: Mesh, collection: str = 'params'
    ) -> Any:
        if collection == 'params':
            return random_params(model, mesh=mesh)
        return init_params(model, key, mesh, collection)

    patch.setattr(sharding, 'init_params', without_init)
