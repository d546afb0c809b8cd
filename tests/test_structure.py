"""The layers of the package: imports point downwards and never run in a circle.

Imports are read from the source with ast, so that those inside functions count too. Modules that
are loaded by name (`importlib.import_module`) cannot be seen this way.
"""

import ast
import functools
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = 'spg_jax'

# A room is a folder or a file directly under spg_jax. It imports from its own layer and from those
# below it. Every room that is not named here is an entry point and may import anything.
LAYERS = (
    ('comparison',),  # which runs are compared, and what their figures say
    ('planning',),  # what a machine would need, asked of all the rest
    ('runs',),  # what a run leaves on disk
    (
        'assembly',
        'explain',
        'limits',
        'presets',
        'config',
        'method',
    ),  # the door: settings become parts
    ('rl',),  # objectives, rollouts, updates
    ('data', 'diffusion', 'training'),
    ('models', 'tasks', 'process'),
    ('errors', 'sharding', 'random'),
)

# The only rooms that these rooms import from, besides themselves.
ALLOWED = {
    'tasks': {'process', 'errors'},  # A task knows no model.
}

# The rooms that these rooms must not import from, whatever the layers become.
FORBIDDEN = {
    'diffusion': {'rl', 'runs', 'assembly'},  # The mathematics of diffusion knows no reward.
}

# Settings stop at the door: the rooms below it see typed values and never a configuration.
SETTINGS = {'ml_collections', 'config', 'method', 'presets', 'limits', 'assembly', 'explain'}
FLAGS = 'spg_jax.process.config_flag'  # It defines --config, and hands it on unread.
BELOW_THE_DOOR = ('rl', 'diffusion', 'models', 'tasks', 'data', 'training', 'process')

Modules = Mapping[str, Path]  # dotted name of a module: its file


def package_modules() -> dict[str, Path]:
    """Returns every module of the package; a folder's `__init__` has the name of the folder."""
    modules = {}
    for path in sorted((ROOT / PACKAGE).rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        modules['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return modules


def imports_of(source: str, module: str, is_package: bool, modules: Modules) -> set[str]:
    """Returns the modules that a module's source imports, at its top or inside functions.

    `from package import name` is an import of `package.name` if that is a module, and of the
    package's `__init__` otherwise. Modules of other packages are returned with their full names.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                steps = node.level - 1 if is_package else node.level
                parents = module.split('.')[: len(module.split('.')) - steps]
                base = '.'.join([*parents, *filter(None, [base])])
            submodules = {f'{base}.{alias.name}' for alias in node.names}
            names |= {name if name in modules else base for name in submodules}
    return names


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Returns the imports of every module of the package."""
    modules = package_modules()
    return {
        name: imports_of(
            path.read_text(encoding='utf-8'), name, path.name == '__init__.py', modules
        )
        for name, path in modules.items()
    }


def circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """Returns one circle of imports in order, closed by its first module, or None without one."""
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in finished:
            return None
        for target in sorted(graph.get(module, ())):
            if (result := visit(target, [*trail, module])) is not None:
                return result
        finished.add(module)
        return None

    return next((result for module in graph if (result := visit(module, []))), None)


def room_of(module: str) -> str:
    """Returns the room of a module of the package, or the name of another package."""
    parts = module.split('.')
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]


def imports_of_room(room: str) -> set[tuple[str, str]]:
    """Returns the pairs (module of the room, module that it imports from outside the room)."""
    return {
        (module, target)
        for module, targets in import_graph().items()
        for target in targets
        if room_of(module) == room != room_of(target)
    }


def test_no_import_runs_in_a_circle():
    assert circle(import_graph()) is None


@pytest.mark.parametrize('room', [room for layer in LAYERS for room in layer])
def test_imports_point_downwards(room):
    depth = next(index for index, layer in enumerate(LAYERS) if room in layer)
    reachable = {name for layer in LAYERS[depth:] for name in layer}
    above = {module for module in package_modules() if room_of(module) not in reachable}
    assert not {pair for pair in imports_of_room(room) if pair[1] in above}


@pytest.mark.parametrize('room', ALLOWED)
def test_a_room_imports_only_what_it_is_allowed_to(room):
    targets = {target for _, target in imports_of_room(room) if target.startswith(PACKAGE)}
    assert {room_of(target) for target in targets} <= ALLOWED[room]


@pytest.mark.parametrize('room', FORBIDDEN)
def test_a_room_imports_nothing_forbidden(room):
    assert not {pair for pair in imports_of_room(room) if room_of(pair[1]) in FORBIDDEN[room]}


@pytest.mark.parametrize('room', BELOW_THE_DOOR)
def test_settings_stop_at_the_door(room):
    readers = {pair for pair in imports_of_room(room) if room_of(pair[1]) in SETTINGS}
    assert not {module for module, _ in readers} - {FLAGS}


def test_every_folder_has_a_layer():
    folders = {path.parent.name for path in (ROOT / PACKAGE).glob('*/__init__.py')}
    assert folders <= {room for layer in LAYERS for room in layer}


def test_imports_of_every_form_are_seen():
    source = (
        'import a.b\n'
        'from p.q import r, constant\n'
        'from . import s\n'
        'from .s import t\n'
        'def function():\n'
        '    from ..u import v\n'
    )
    modules = dict.fromkeys(('p.q', 'p.q.r', 'x.y.s', 'x.u'))
    expected = {'a.b', 'p.q.r', 'p.q', 'x.y.s', 'x.u'}
    assert imports_of(source, 'x.y.z', False, modules) == expected
    assert imports_of(source, 'x.y', True, modules) == expected


def test_a_circle_is_seen():
    graph = {'a': {'b', 'numpy'}, 'b': {'c'}, 'c': {'d'}, 'd': {'b'}, 'e': {'a'}}
    assert circle(graph) == ['b', 'c', 'd', 'b']
    assert circle(graph | {'d': set()}) is None
