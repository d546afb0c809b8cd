"""What the entry points share: flags, the compile cache and errors on one line."""

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

# What a user can mend: a wrong value, file or machine. Anything else is a bug, with its traceback.
MENDABLE = (ValueError, OSError, FloatingPointError)


def define_config_flag(required: bool = True) -> None:
    """The --config flag: of a training, or of what to do with a --checkpoint."""
    config_flags.DEFINE_config_file(
        'config', None, 'configs/TASK.py[:PRESET]; --config.GROUP.KEY=VALUE overrides.'
    )
    if required:
        flags.mark_flag_as_required('config')
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS['config'])  # so --help has it


def define_distributed_flag() -> None:
    """The flag that makes this one of several processes."""
    flags.DEFINE_bool(
        'distributed',
        False,
        'Be one of several processes, found on TPU VMs and under srun, else as '
        'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say.',
    )


def define_policy_flags() -> None:
    """The flags that name a policy: --workdir, or --checkpoint with --config and an --adapter."""
    flags.DEFINE_string('workdir', '', 'A run of spg_jax.train, or a policy trained here.')
    flags.DEFINE_string(
        'checkpoint', '', 'Any policy, or a published checkpoint; needs --config, which has none.'
    )
    flags.DEFINE_string('adapter', '', 'An adapter that PEFT saved, on top of the checkpoint.')
    flags.DEFINE_list(
        'mesh',
        [],
        'Devices along data, fsdp, tensor, such as 1,-1,1; else the configuration decides.',
    )
    define_config_flag(required=False)


def chosen_mesh(configured: Mapping[str, int]) -> Mesh:
    """The mesh of --mesh, or else the one that is configured, as devices along each axis.

    Raises:
      ValueError: --mesh is not three numbers, or as `sharding.make_mesh`.
    """
    given = flags.FLAGS.mesh
    if not given:
        return sharding.make_mesh(configured)
    try:
        sizes = dict(zip(sharding.AXES, map(int, given), strict=True))
    except ValueError:
        raise ValueError(
            f'--mesh is {",".join(given)}; use three numbers, of devices along '
            f'{", ".join(sharding.AXES)}, such as 1,-1,1'
        ) from None
    return sharding.make_mesh(sizes)


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Parses the flags and runs `main`; what the user can mend is one line and exit status 1."""
    if libtpu.is_installed() and libtpu.surely_absent():
        libtpu.work_without_a_tpu()  # it writes lines of errors where JAX merely looks for a TPU
    app.run(_one_line_errors(main), flags_parser=_parse)


def compile_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or a user cache."""
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
        jax.config.update('jax_compilation_cache_dir', os.path.join(cache, 'spg_jax', 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def _one_line_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def guarded(arguments: list[str]) -> None:
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)  # libraries tell of every array they save
        try:
            if 'distributed' in flags.FLAGS and flags.FLAGS.distributed:
                distributed.start()
            main(arguments)
        except Exception as error:
            said = ' '.join(str(error).split())
            if not isinstance(error, MENDABLE) or os.environ.get('SPG_JAX_TRACEBACK'):
                if jax.process_count() == 1:
                    raise
                traceback.print_exc()
                said = f'{type(error).__name__}: {said}'
            distributed.fail(said)

    return guarded


def _parse(arguments: list[str]) -> list[str]:
    """absl's parsing; a configuration file that cannot be used is one line, too."""
    try:
        return flags.FLAGS(arguments)
    except AttributeError as error:  # an override of a setting that does not exist
        distributed.fail(f'no setting {error} in the configuration; spg_jax/config.py has them all')
    except (flags.Error, KeyError, OSError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        distributed.fail(f'{lines[-1] if lines else error}; see --help')
