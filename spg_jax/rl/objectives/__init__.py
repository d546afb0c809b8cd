"""Policy-gradient objectives, one file for each; the configuration names an objective by its file.

To add an objective, put a module here, or anywhere on the path of Python, that defines `Settings`,
a dataclass of `setting`s, `build(settings, protocol) -> Objective`, and `RECIPE`, published values
of other settings; nothing else needs to change.
"""

import importlib
import pkgutil

from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
    Method,
    Moment,
    Objective,
    Phase,
    Protocol,
    Ring,
    View,
)

PARTS = ('Settings', 'build', 'RECIPE')


def _method(module: str) -> Method:
    loaded = importlib.import_module(module)
    return Method(loaded.Settings, loaded.build, loaded.RECIPE)


REGISTRY: dict[str, Method] = {
    module.name: _method(f'{__name__}.{module.name}')
    for module in pkgutil.iter_modules(__path__)
    if module.name not in ('objective', 'ratios', 'sequences')
}

__all__ = [
    'REGISTRY',
    'Batch',
    'Loss',
    'Method',
    'Moment',
    'Objective',
    'Phase',
    'Protocol',
    'Ring',
    'View',
]
