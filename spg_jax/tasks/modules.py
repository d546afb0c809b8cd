"""Tasks in modules of the user, which a setting names by their dotted paths."""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from spg_jax.errors import one_line
from spg_jax.tasks.task import Task


def load(path: str, known: Sequence[str]) -> type[Task]:
    """Returns the task class of a module on the path of Python or in the current directory.

    Args:
      path: the dotted path of the module, such as `my_package.my_task`. A path without a dot must
        be that of a file in the current directory.
      known: the names of the tasks that come with the package, for the error message.

    Raises:
      ValueError: the name is neither, or the module cannot be imported, or it does not define
        exactly one task with all the parts that a task needs; the message is one line.
    """
    if '/' in path or path.endswith('.py'):
        dotted = '.'.join(Path(path).with_suffix('').parts).strip('./')
        raise ValueError(f'task is {path!r}, a file; use the dotted path of the module, {dotted}')
    is_dotted = '.' in path and all(map(str.isidentifier, path.split('.')))
    if not is_dotted and not Path(f'{path}.py').is_file():
        nearest = difflib.get_close_matches(path, known, 1)
        meant = f', perhaps {nearest[0]}' if nearest else ''
        raise ValueError(
            f'task is {path!r}{meant}; use one of {", ".join(known)}, or the dotted path of a '
            'module with a task, such as my_package.my_task'
        )
    kind = _task_of(_imported(path), path)
    missing = kind.missing_parts()
    if missing:
        raise ValueError(
            f'task {path}: class {kind.__name__} in {inspect.getfile(kind)} has no '
            f'{" and no ".join(missing)}; a task needs prompt, reward, score and problems'
        )
    kind.name = kind.name or path
    return kind


def _imported(path: str) -> ModuleType:
    directory = os.getcwd()
    if not {'', directory} & set(sys.path):
        sys.path.append(directory)
    importlib.invalidate_caches()  # The module may be younger than this process.
    try:
        return importlib.import_module(path)
    except Exception as error:
        parents = [path[:end] for end, sign in enumerate(f'{path}.') if sign == '.']
        if isinstance(error, ModuleNotFoundError) and error.name in parents:
            raise ValueError(
                f'task is {path!r}, but there is no module {error.name}; start in the directory '
                f'that holds it, which is {directory} now, or add that to PYTHONPATH'
            ) from error
        raise ValueError(f'task {path} cannot be imported: {_place_and_cause(error)}') from error


def _place_and_cause(error: Exception) -> str:
    """Returns where in a module of the user an error arose, and the error, in one line."""
    if isinstance(error, SyntaxError):
        return f'{error.filename}:{error.lineno or 1}: {error.msg}'
    frames = traceback.extract_tb(error.__traceback__)
    places = [f'{frame.filename}:{frame.lineno}: ' for frame in frames if _is_users(frame.filename)]
    return (places[-1] if places else '') + one_line(error)


def _is_users(filename: str) -> bool:
    return not filename.startswith('<') and Path(filename) not in (
        Path(__file__),
        Path(importlib.__file__),
    )


def _task_of(module: ModuleType, path: str) -> type[Task]:
    """Returns the one task that a module defines; a base class of another task does not count."""
    classes = dict.fromkeys(filter(inspect.isclass, vars(module).values()))
    kinds = [
        kind for kind in classes if issubclass(kind, Task) and kind.__module__ == module.__name__
    ]
    leaves = [kind for kind in kinds if not any(kind in other.__bases__ for other in kinds)]
    if len(leaves) == 1:
        return leaves[0]
    names = ' and '.join(kind.__name__ for kind in leaves)
    found = f'defines the tasks {names}' if leaves else 'defines no task'
    raise ValueError(
        f'task {path}: {module.__file__} {found}; expected one class derived from '
        'spg_jax.tasks.Task'
    )
