"""Policy-gradient objectives, one file each. A file's name is the objective's name in the
configuration.

To add one, put a module here with `build(config) -> Objective`; nothing else needs to change.
"""

import importlib
import pkgutil
from collections.abc import Callable

import ml_collections

from spg_jax.rl.objectives.objective import Batch, Loss, Objective

REGISTRY: dict[str, Callable[[ml_collections.ConfigDict], Objective]] = {
    module.name: importlib.import_module(f'{__name__}.{module.name}').build
    for module in pkgutil.iter_modules(__path__)
    if module.name != 'objective'
}

__all__ = ['REGISTRY', 'Batch', 'Loss', 'Objective']
