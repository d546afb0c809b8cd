"""Policy-gradient objectives, one file for each; the configuration names an objective by its file.

To add an objective, put a module here that defines `Settings`, a NamedTuple, and `build(settings,
corruption) -> Objective`; nothing else needs to change.
"""

import importlib
import pkgutil

from spg_jax.rl.objectives.objective import Batch, Loss, Method, Objective


def _method(name: str) -> Method:
    module = importlib.import_module(f'{__name__}.{name}')
    return Method(module.Settings, module.build)


REGISTRY: dict[str, Method] = {
    module.name: _method(module.name)
    for module in pkgutil.iter_modules(__path__)
    if module.name != 'objective'
}

__all__ = ['REGISTRY', 'Batch', 'Loss', 'Method', 'Objective']
