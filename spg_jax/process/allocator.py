"""Memory that is used twice: glibc's allocator keeps what a program on CPUs frees. Python's
collector of garbage, which looks for other memory to free, works less often than it would.

XLA on CPUs takes the outputs and temporaries of each execution from malloc and frees them after it.
glibc maps a large piece anew each time and unmaps it again, so that the kernel faults and zeroes
every page at every execution. With the settings below it keeps the pages instead, with equal
results; docs/performance.md says what that saves.

Only the first heap of a process can hold pieces over 64 MiB, and a thread that starts later gets
another one. Executions therefore run in the thread that calls them. The other way, one heap for all
threads, is slow once something has been compiled: the compiler leaves tens of thousands of holes,
among which every thread then searches in turn.
"""

import ctypes
import gc
import os
import sys

import jax

# mallopt(3): the name of a setting, its number in malloc.h, and the value.
_SETTINGS = (
    ('M_MMAP_MAX', -4, 0),  # large pieces come from the heap, which is kept
    ('M_TRIM_THRESHOLD', -1, -1),  # the heap is never given back
    ('M_TOP_PAD', -2, 256 * 2**20),  # bytes by which the heap grows at least
)
# New objects after which Python looks for unreachable cycles among the youngest ones, and how many
# such looks precede one at the next older generation. Python's own numbers are 700, 10 and 10.
_COLLECTOR = 10_000, 20, 100


def collect_seldom() -> None:
    """Lets Python look for unreachable cycles of objects less often.

    Tracing a program makes many objects that stay, and to look through them over and over takes a
    seventh of a start whose programs are compiled already.
    """
    gc.set_threshold(*_COLLECTOR)


def keep_memory() -> None:
    """Tells glibc to keep freed memory, and JAX to execute programs on CPUs in the thread that
    calls them; call it before JAX looks for devices.

    Nothing happens without glibc, or where the environment already has settings for its malloc.
    A line on standard error says if glibc refuses a setting; programs are then slower.
    """
    chosen = [name for name in os.environ if name.startswith('MALLOC_')]
    if chosen or 'glibc.malloc' in os.environ.get('GLIBC_TUNABLES', ''):
        return
    if not sys.platform.startswith('linux'):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, 'gnu_get_libc_version'):
        return
    for name, number, value in _SETTINGS:
        if not library.mallopt(number, value):
            print(
                f'the allocator refuses {name}={value}, so programs on CPUs take longer',
                file=sys.stderr,
                flush=True,
            )
            return
    jax.config.update('jax_cpu_enable_async_dispatch', False)
