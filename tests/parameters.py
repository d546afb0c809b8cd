"""Random parameters from NumPy, for tests that compare computations: an init takes seconds to
compile for each size of a model."""

import math
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

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
