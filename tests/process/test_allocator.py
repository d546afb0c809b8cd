"""Freed memory is kept: the kernel is asked for pages once, not at every use."""

import os
import sys

import pytest

from spg_jax.process import allocator
from tests import processes

# Prints the page faults of writing 50 pieces of 40 MB, one after the other.
FAULTS = """
import ctypes, resource
from spg_jax.process import allocator
if {keep}:
    allocator.keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(50):
    piece = libc.malloc(40_000_000)
    ctypes.memset(piece, 1, 40_000_000)
    libc.free(piece)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""

# The same of 10 executions of a program that needs 100 MB of temporaries.
EXECUTIONS = """
import resource
from spg_jax.process import allocator
if {keep}:
    allocator.keep_memory()
import jax, jax.numpy as jnp
program = jax.jit(lambda x: jnp.sin(x[:, None] * x) @ jnp.stack([x, x], 1))
x = jnp.ones(5000)
for count in range(12):
    if count == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc is on Linux only')


def faults(keep: bool, program: str = FAULTS, **variables: str) -> int:
    environment = processes.environment(devices=1, **variables)
    environment = {k: v for k, v in environment.items() if k in variables or k[:7] != 'MALLOC_'}
    command = [sys.executable, '-c', program.format(keep=keep)]
    result = processes.run(command, env=environment)
    assert not result.stderr
    return int(result.stdout)


@linux
def test_memory_is_used_twice():
    """Each piece has about 9,800 pages of 4 KiB; kept memory faults once for all fifty."""
    assert faults(keep=True) < faults(keep=False) / 3


@linux
def test_executions_use_memory_twice():
    """Each has 24,400 pages of 4 KiB. The heaps of threads that JAX starts could not keep them; the
    heap of the main thread may still grow once or twice."""
    kept = faults(keep=True, program=EXECUTIONS)
    assert kept < faults(keep=False, program=EXECUTIONS) / 3


@linux
def test_settings_of_the_environment_stay():
    """A user who sets malloc has reasons: here everything is mapped, and faults every time."""
    kept = faults(keep=True)
    assert faults(keep=True, MALLOC_MMAP_THRESHOLD_='100000') > 5 * kept


def test_a_refused_setting_is_one_line(monkeypatch, capsys):
    class Library:
        gnu_get_libc_version = None

        def mallopt(self, number: int, value: int) -> int:
            return int(number != -2)

    monkeypatch.setattr(allocator.sys, 'platform', 'linux')
    monkeypatch.setattr(allocator.ctypes, 'CDLL', lambda _: Library())
    for name in list(os.environ):
        if name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES':
            monkeypatch.delenv(name)
    allocator.keep_memory()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and 'refuses M_TOP_PAD=268435456' in lines[0]


def test_other_systems_are_left_alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES':
            monkeypatch.delenv(name)
    asked = []
    monkeypatch.setattr(allocator.sys, 'platform', 'darwin')
    monkeypatch.setattr(allocator.ctypes, 'CDLL', asked.append)
    allocator.keep_memory()
    assert not asked
