"""Commands that one process runs one after the other, each in a fork of itself.

Imports are most of what a command costs that is refused at once, and some seconds of any other's;
forks share them. Each fork runs its module as `python -m` does and ends as an interpreter ends.

    python -m tests.forks    # reads from standard input what `run_all` writes
"""

import json
import os
import runpy
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tests.processes import REPOSITORY, environment, run


class Ended(NamedTuple):
    """What a command has left."""

    code: int
    out: str
    error: str


def run_all(commands: list[tuple[str, Path, list[str]]], **variables: str) -> list[Ended]:
    """What commands of the repository leave, each a module, its directory and its arguments, in an
    environment with more variables."""
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            (module, str(directory), arguments, f'{folder}/{number}')
            for number, (module, directory, arguments) in enumerate(commands)
        ]
        server = run(
            [sys.executable, '-m', 'tests.forks'],
            json.dumps(cases),
            cwd=REPOSITORY,
            env=environment(**variables),
        )
        assert server.returncode == 0, server.stderr
        return [
            Ended(code, *(Path(f'{path}.{end}').read_text() for end in ('out', 'error')))
            for code, (*_, path) in zip(json.loads(server.stdout), cases, strict=True)
        ]


def _be(module: str, directory: str, arguments: list[str], path: str) -> None:
    """Makes this process the command, whose output goes to files beside a path."""
    for descriptor, end in ((1, 'out'), (2, 'error')):
        file = os.open(f'{path}.{end}', os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(directory)
    sys.path[0] = directory
    sys.argv = [module, *arguments]
    del sys.modules[module]  # which has its flags only where it is the main module
    runpy.run_module(module, run_name='__main__', alter_sys=True)
    sys.exit()


if __name__ == '__main__':
    commands = json.load(sys.stdin)
    for name in sorted({name for name, *_ in commands}):
        import_module(name)
    codes = []
    for command in commands:
        child = os.fork()
        if not child:
            _be(*command)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))
