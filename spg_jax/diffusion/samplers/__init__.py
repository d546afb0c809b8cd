"""Samplers by name: which tokens a denoising step commits.

`rules` holds the rules, `settings` how a completion is decoded, `decoder` the loop over steps. A
rule of a user is named by its dotted path (docs/sampling.md).
"""

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from spg_jax.diffusion.samplers.rules import REGISTRY, Sampler, View
from spg_jax.errors import nearest, one_line

__all__ = ['REGISTRY', 'Sampler', 'View', 'find', 'source_file']


def find(name: str, key: str = 'sampling.sampler') -> Sampler:
    """The sampler of a name: one of the registry, or what a dotted path names.

    The path names a `Sampler`, a rule, or a class whose instances are one of these. Nothing is
    claimed of a bare rule: it counts as one that looks at tokens.

    Args:
      name: a key of REGISTRY, or a path such as my_package.my_module.my_rule.
      key: the setting that the message names.

    Raises:
      ValueError: there is none; one line says what there is.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    target = _own(name, key)
    if inspect.isclass(target):
        try:
            target = target()
        except Exception as error:
            raise ValueError(f'{key} is {name!r}, a class that fails: {one_line(error)}') from None
    if isinstance(target, Sampler):
        return target
    if not callable(target):
        raise ValueError(
            f'{key} is {name!r}, a {type(target).__name__}; use the path of a rule '
            '(view, config) -> scores, or of a Sampler'
        )
    return Sampler(target)


def source_file(name: str, key: str = 'sampling.sampler') -> Path | None:
    """The file of the module of a user's own sampler; None for a name of the registry."""
    if name in REGISTRY:
        return None
    _own(name, key)
    return Path(sys.modules[name.rpartition('.')[0]].__file__)


def _own(name: str, key: str) -> Any:
    """What the dotted path of a user names; raises ValueError if there is nothing."""
    path, _, attribute = name.rpartition('.')
    near = nearest(name, REGISTRY)
    names = f'{near}, or another of {", ".join(REGISTRY)}' if near else ', '.join(REGISTRY)
    if not near:
        names = f'one of {names}'
    unknown = f'{key} is {name!r}; use {names}, or the dotted path of your own rule'
    if not path or not all(part.isidentifier() for part in name.split('.')):
        raise ValueError(unknown)
    directory = os.getcwd()
    if directory not in sys.path:  # as under PYTHONSAFEPATH, and in programs that are installed
        sys.path.append(directory)
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise ValueError(f'{key} is {name!r}: {one_line(error)}') from None
    if not hasattr(module, attribute):
        raise ValueError(f'{key} is {name!r}, but {module.__file__} has no {attribute}')
    return getattr(module, attribute)
