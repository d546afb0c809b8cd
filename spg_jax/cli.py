"""What the entry points share: the configuration flag, the compile cache and errors on one line."""

import os
import sys
from collections.abc import Callable

import jax
from absl import flags, logging

# What a user can mend: a wrong value, file or machine. Anything else is a bug and keeps its traceback.
MENDABLE = (ValueError, FileNotFoundError, FloatingPointError, PermissionError)


def one_line_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """`main`, with an error that the user can mend printed as one line and exit status 1."""

    def run(arguments: list[str]) -> None:
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)      # libraries tell of every array they save
        try:
            main(arguments)
        except MENDABLE as error:
            if os.environ.get('SPG_JAX_TRACEBACK'):
                raise
            print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
            sys.exit(1)

    return run


def compile_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or a user cache."""
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
        jax.config.update('jax_compilation_cache_dir', os.path.join(cache, 'spg_jax', 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
