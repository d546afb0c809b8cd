"""Arrays on disk, in the layout of Orbax: what is read is what was saved, or one line says why not.

Orbax and TensorStore raise a dozen types, with messages of many lines, and log them as well.
"""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from spg_jax.errors import one_line
from spg_jax.process.files import local_path
from spg_jax.training.digests import digest_arrays, non_finite

# Each device that holds a copy of an array writes a share of it, for which JAX compiles a program.
# That takes longer than writing a small array.
_LARGE_SHARES = ocp.options.ArrayOptions(
    saving=ocp.options.ArrayOptions.Saving(min_slice_bytes_for_replica_parallel=2**20)
)


def abstract(tree: Any) -> Any:
    """The shapes, types and shardings of a tree of arrays, as a target to restore into.

    Arrays of the host are their own targets.
    """

    def target(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(target, tree)


def restored(path: Path, load: Callable[[Path], Any]) -> Any:
    """The result of `load` for a path.

    Raises:
      ValueError: `load` fails, or Orbax cannot read from a path of this name; the message has one
        line and names the path.
    """
    path = local_path(str(path.absolute()), saves=True)
    try:
        with _silent_logs():
            return load(path)
    except Exception as error:
        raise ValueError(
            f'{path} cannot be read: it is damaged or of another configuration '
            f'({one_line(error)[:300]})'
        ) from error


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Runs a block that writes arrays to a path and reads them back.

    Raises:
      OSError: the block fails; the message has one line and names the path.
    """
    try:
        with _silent_logs(), ocp.Context(array_options=_LARGE_SHARES):
            yield
    except Exception as error:
        raise OSError(
            f'{path} could not be saved ({one_line(error)[:300]}); make room, or let the '
            'folder be written, and run the same command to go on'
        ) from error


@contextlib.contextmanager
def _silent_logs() -> Iterator[None]:
    """Keeps thousands of lines off the screen, in which Orbax logs an error that it also raises."""
    _ignore_abandoned_reads()
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous)


@functools.cache
def _ignore_abandoned_reads() -> None:
    """Drops what Python says, at any later time, of reads that nobody waits for any more.

    When the read of one array fails, Orbax abandons those of the others and closes its event loop.
    """
    logging.getLogger('asyncio').addFilter(
        lambda record: 'exception was never retrieved' not in record.getMessage()
    )
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited')  # none here are ours
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        code = getattr(unraisable.object, 'cr_code', None)  # of a coroutine
        is_read = code is not None and 'orbax' in code.co_filename
        if not is_read and str(unraisable.exc_value) != 'Event loop is closed':
            report(unraisable)

    sys.unraisablehook = report_others


def check_digest(path: Path, arrays: Any, digest: str) -> None:
    """Raises ValueError unless the arrays read from a path are, bit for bit, those of a digest."""
    if digest_arrays(arrays) != digest:
        raise ValueError(
            f'{path}: the arrays are not those that were saved, by the digest in '
            f'{path.parent}/policy.json; use another copy of the policy, or make it anew'
        )


def check_finite(path: Path, arrays: Any) -> None:
    """Raises ValueError if an array read from a path is NaN or infinite; the message names it."""
    name = non_finite(arrays)
    if name:
        raise ValueError(
            f'{path}: {name} holds numbers that are not finite; use another policy, for this '
            'one can answer nothing'
        )
