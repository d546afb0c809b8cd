"""What the entry points share: flags, the compile cache and error messages of one line."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from spg_jax import sharding
from spg_jax.process import distributed, libtpu

# A user can mend these: a wrong value, file or machine. Any other exception is a bug, and its
# traceback is shown.
MENDABLE = (ValueError, OSError, FloatingPointError)


def define_config_flag(required: bool = True) -> None:
    """Defines --config, which configures a training, or says how to use a --checkpoint."""
    config_flags.DEFINE_config_file(
        'config', None, 'configs/TASK.py[:PRESET]; --config.GROUP.KEY=VALUE overrides.'
    )
    if required:
        flags.mark_flag_as_required('config')
    # So that --help lists the flag.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS['config'])


def define_distributed_flag() -> None:
    """Defines --distributed, which makes this process one of several."""
    flags.DEFINE_bool(
        'distributed',
        False,
        'Run as one of several processes. They find each other on TPU VMs and under srun; '
        'elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.',
    )


def define_policy_flags() -> None:
    """Defines the flags that name a policy: --workdir, or --checkpoint, --config and --adapter."""
    flags.DEFINE_string('workdir', '', 'A run of spg_jax.train, or a policy trained here.')
    flags.DEFINE_string(
        'checkpoint', '', 'Any policy or published checkpoint; it needs --config as well.'
    )
    flags.DEFINE_string('adapter', '', 'An adapter that PEFT saved, to add to the checkpoint.')
    flags.DEFINE_list(
        'mesh',
        [],
        'Devices along data, fsdp and tensor, such as 1,-1,1; by default those of --config.',
    )
    define_config_flag(required=False)


def chosen_mesh(configured: Mapping[str, int]) -> Mesh:
    """The mesh of --mesh, or the configured one without that flag.

    Args:
      configured: the number of devices along each axis.

    Raises:
      ValueError: if --mesh is not three numbers, or `sharding.make_mesh` refuses the mesh.
    """
    numbers = flags.FLAGS.mesh
    if not numbers:
        return sharding.make_mesh(configured)
    try:
        sizes = dict(zip(sharding.AXES, map(int, numbers), strict=True))
    except ValueError:
        raise ValueError(
            f'--mesh is {",".join(numbers)}; use three numbers, of devices along '
            f'{", ".join(sharding.AXES)}, such as 1,-1,1'
        ) from None
    return sharding.make_mesh(sizes)


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Parses flags and runs `main`; an error that a user can mend is one line and exit status 1."""
    if libtpu.is_installed() and libtpu.surely_absent():
        # Otherwise libtpu prints errors when JAX looks for a TPU.
        libtpu.work_without_a_tpu()
    app.run(_one_line_errors(main), flags_parser=_parse)


def compile_cache() -> None:
    """Keeps compiled programs for later runs, in JAX_COMPILATION_CACHE_DIR or the user's cache."""
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
        jax.config.update('jax_compilation_cache_dir', os.path.join(cache, 'spg_jax', 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def _one_line_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def guarded(arguments: list[str]) -> None:
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)  # Libraries log every array that they save.
        try:
            if 'distributed' in flags.FLAGS and flags.FLAGS.distributed:
                distributed.start()
            main(arguments)
        except Exception as error:
            message = ' '.join(str(error).split())
            if not isinstance(error, MENDABLE) or os.environ.get('SPG_JAX_TRACEBACK'):
                if jax.process_count() == 1:
                    raise
                traceback.print_exc()
                message = f'{type(error).__name__}: {message}'
            distributed.fail(message)

    return guarded


def _parse(arguments: list[str]) -> list[str]:
    """Parses with absl; a configuration that cannot be used also gives an error of one line."""
    try:
        return flags.FLAGS(arguments)
    except AttributeError as error:  # A flag overrides a setting that does not exist.
        distributed.fail(f'no setting {error} in the configuration; spg_jax/config.py has them all')
    except (flags.Error, KeyError, OSError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        distributed.fail(f'{lines[-1] if lines else error}; see --help')
