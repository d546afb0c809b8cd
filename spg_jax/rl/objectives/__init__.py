"""Policy-gradient objectives, one file for each; the configuration names an objective by its file.

To add an objective, put a module here, or anywhere on the path of Python, that defines `Settings`,
a dataclass of `setting`s, `build(settings, protocol) -> Objective`, and `RECIPE`, published values
of other settings; nothing else needs to change (docs/own_method.md).
"""

import dataclasses
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from spg_jax.errors import line_in, nearest, one_line
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

# What the file of an objective defines, and what that is.
PARTS = {
    'Settings': 'a dataclass of `setting`s',
    'build': 'a function (settings, protocol) -> Objective',
    'RECIPE': 'a dict of published values of other settings by GROUP.KEY, which may be empty',
}


def _method(module: ModuleType) -> Method:
    """The parts that a module defines; raises ValueError for the first that it lacks."""
    for part, meaning in PARTS.items():
        if not hasattr(module, part):
            raise ValueError(f'{module.__file__} has no {part}, {meaning}')
    if not (isinstance(module.Settings, type) and dataclasses.is_dataclass(module.Settings)):
        raise ValueError(f'{module.__file__}: Settings is no dataclass; use {PARTS["Settings"]}')
    for field in dataclasses.fields(module.Settings):
        if field.default is dataclasses.MISSING:
            raise ValueError(f'{module.__file__}: Settings.{field.name} has no default value')
        if not isinstance(field.default, str | bool | int | float | tuple):
            raise ValueError(
                f'{module.__file__}: Settings.{field.name} is {field.default!r}; use text, a bool, '
                'a number or a tuple'
            )
    if not callable(module.build):
        raise ValueError(f'{module.__file__}: build is no function; use {PARTS["build"]}')
    if not isinstance(module.RECIPE, Mapping):
        raise ValueError(f'{module.__file__}: RECIPE is no dict; use {PARTS["RECIPE"]}')
    return Method(module.Settings, module.build, module.RECIPE)


def _registry() -> dict[str, Method]:
    """The methods of this folder by their names; a module with no part of one is shared by them."""
    loaded = {
        each.name: importlib.import_module(f'{__name__}.{each.name}')
        for each in pkgutil.iter_modules(__path__)
    }
    return {
        name: _method(module)
        for name, module in loaded.items()
        if any(hasattr(module, part) for part in PARTS)
    }


REGISTRY: dict[str, Method] = _registry()


def find(name: str) -> Method:
    """The method that `rl.objective` names: one of the registry, or the module of a dotted path.

    Modules are looked for in the current directory as well.

    Raises:
      ValueError: there is none, its file fails, or the file lacks a part; one line says which.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    try:
        return _method(_own_module(name))
    except ValueError as error:
        raise ValueError(f'rl.objective is {name!r}: {error}') from None


def group_of(name: str) -> str:
    """The group of an objective's settings: its name, or the last component of its dotted path."""
    return name.rpartition('.')[2]


def source_file(name: str) -> Path | None:
    """The file of a user's own objective; None for an objective of the registry."""
    if name in REGISTRY:
        return None
    return Path(_own_module(name).__file__)


def _own_module(name: str) -> ModuleType:
    """The module of a user's own objective; raises ValueError if it cannot be imported."""
    near, names = nearest(name, REGISTRY), ', '.join(REGISTRY)
    first = f'use {near}, or another of' if near else 'use one of'
    unknown = f'{first} {names}, or the dotted path of your own module'
    if not all(part.isidentifier() for part in name.split('.')):
        raise ValueError(unknown)
    directory = os.getcwd()
    if directory not in sys.path:  # as under PYTHONSAFEPATH, and in programs that are installed
        sys.path.append(directory)
    path = name
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin:  # A folder has no origin.
            raise ModuleNotFoundError(name=name)
        path = spec.origin
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f'{name}.'.startswith(f'{error.name}.'):  # The module imports what is not there.
            raise ValueError(f'{path}:{line_in(path, error)}: {one_line(error)}') from None
        if '.' not in name:
            raise ValueError(unknown) from None
        raise ValueError(
            f'there is no module {error.name!r}; run in the directory that holds it, or add that '
            'directory to PYTHONPATH'
        ) from None
    except SyntaxError as error:
        raise ValueError(f'{error.filename}:{error.lineno or 1}: {error.msg}') from None
    except Exception as error:
        if os.environ.get('SPG_JAX_TRACEBACK'):
            traceback.print_exc()
        raise ValueError(f'{path}:{line_in(path, error)}: {one_line(error)}') from None


__all__ = [
    'PARTS',
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
    'find',
    'group_of',
    'source_file',
]
