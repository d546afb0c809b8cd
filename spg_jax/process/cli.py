"""What the entry points share: flags, surroundings, the compile cache and errors of one line."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
from absl import app, flags, logging
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.process import allocator, distributed, libtpu, streams
from spg_jax.process.config_flag import (
    Complete,
    UnusableConfig,
    define_config_flag,
    explained,
    left_over,
)
from spg_jax.process.files import drop_unused, local_path, user_cache

# A user can mend these: a wrong value, file or machine. Any other exception is a bug, and its
# traceback is shown.
MENDABLE = (ValueError, OSError, FloatingPointError)

# Options of JAX that change numbers. The environment sets them, so a run could go on with other
# numbers than it began with. XLA_FLAGS stays, because it also says how many devices there are.
NUMBERS = {
    'jax_enable_x64': False,
    'jax_threefry_partitionable': True,
    'jax_default_prng_impl': 'threefry2x32',
    'jax_random_seed_offset': 0,
    'jax_high_dynamic_range_gumbel': False,
    'jax_default_matmul_precision': None,
    'jax_numpy_dtype_promotion': 'standard',
    'jax_softmax_custom_jvp': False,
    'jax_disable_jit': False,
    'jax_disable_most_optimizations': False,
}
# The programs of a run on a laptop take a megabyte. JAX could bound its cache by itself, but
# would read a file for each program that is there whenever it adds one.
CACHED_BYTES = 2 * 2**30

HELP = frozenset(('--help', '-help', '-h', '-?', '--helpshort', '--helpfull'))
# Options of JAX that forbid what the programs here do.
GUARDS = (
    'jax_transfer_guard',
    'jax_transfer_guard_host_to_device',
    'jax_transfer_guard_device_to_host',
    'jax_transfer_guard_device_to_device',
)


class _PathParser(flags.ArgumentParser):
    """Reads a path of this machine, as `files.local_path`."""

    def __init__(self, saves: bool):
        super().__init__()
        self._saves = saves

    def parse(self, argument: str) -> str:
        """Returns the path with ~ expanded; '' stays ''."""
        return str(local_path(argument, self._saves)) if argument else ''


def define_path_flag(name: str, default: str | None, help: str, saves: bool = False) -> None:
    """Defines a flag whose value is a path; `saves` if checkpoints live under the path."""
    flags.DEFINE(_PathParser(saves), name, default, help, serializer=flags.ArgumentSerializer())
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def define_distributed_flag() -> None:
    """Defines --distributed, which makes this process one of several."""
    flags.DEFINE_bool(
        'distributed',
        False,
        'Run as one of several processes. They find each other on TPU VMs and under srun; '
        'elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.',
    )


def define_policy_flags(complete: Complete) -> None:
    """Defines the flags that name a policy: --workdir, or --checkpoint, --config and --adapter.

    Args:
      complete: as in `define_config_flag`.
    """
    define_path_flag('workdir', '', 'A run of spg_jax.train, or a policy trained here.')
    define_path_flag(
        'checkpoint', '', 'Any policy or published checkpoint; it needs --config as well.'
    )
    define_path_flag('adapter', '', 'An adapter that PEFT saved, to add to the checkpoint.')
    flags.DEFINE_list(
        'mesh',
        [],
        'Devices along data, fsdp and tensor, such as 1,-1,1; by default those of --config.',
    )
    define_config_flag(complete, required=False)


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
    streams.outlive_readers()
    allocator.collect_seldom()
    allocator.keep_memory()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # after the imports of the package
    if libtpu.is_installed() and libtpu.surely_absent():
        # Otherwise libtpu prints errors when JAX looks for a TPU.
        libtpu.work_without_a_tpu()
    # Matplotlib would refuse to start with the backend of a notebook that is not installed here.
    os.environ['MPLBACKEND'] = 'agg'
    fix_numbers()
    try:
        app.run(_one_line_errors(main), flags_parser=_parse)
    except KeyboardInterrupt:
        distributed.fail('interrupted', status=130)
    except SystemExit as ended:
        if HELP.isdisjoint(sys.argv[1:]):
            raise
        raise SystemExit(0) from ended  # absl ends with 1 after it has shown its help


def fix_numbers() -> None:
    """Gives the options of JAX that change numbers the values that every run has.

    One line on standard error names each variable of the environment that is ignored for it.
    """
    current = jax.config.values
    for option, value in NUMBERS.items():
        if current[option] != value:
            jax.config.update(option, value)
            variable = option.upper()
            print(
                f'{variable}={os.environ.get(variable, "")} is ignored, because it would change '
                'the numbers of a run',
                file=sys.stderr,
                flush=True,
            )
    for option in GUARDS:
        jax.config.update(option, None)


def compile_cache() -> None:
    """Keeps compiled programs for later runs, in JAX_COMPILATION_CACHE_DIR or the user's cache.

    The latter holds at most CACHED_BYTES when a command starts. A folder that the user names is
    only bounded by the user's JAX_COMPILATION_CACHE_MAX_SIZE.
    """
    cache = user_cache()
    if cache and not jax.config.jax_compilation_cache_dir:
        folder = cache / 'spg_jax' / 'compiled'
        drop_unused(folder, CACHED_BYTES)
        jax.config.update('jax_compilation_cache_dir', str(folder))
    # Hundreds of small programs take seconds together.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def _one_line_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def guarded(arguments: list[str]) -> None:
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)  # Libraries log every array that they save.
        try:
            if 'distributed' in flags.FLAGS and flags.FLAGS.distributed:
                distributed.start()
            main(arguments)
            streams.check_delivered()
        except Exception as error:
            message = _mendable(error)
            if message is None or os.environ.get('SPG_JAX_TRACEBACK'):
                if not distributed.several():
                    raise
                traceback.print_exc()
                message = f'{type(error).__name__}: {" ".join(str(error).split())}'
            distributed.fail(message)

    return guarded


def _mendable(error: Exception) -> str | None:
    """What a user who can mend an error is told, in one line; None if the error is a bug."""
    message = ' '.join(str(error).split())
    if isinstance(error, MENDABLE):
        return message
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in message:
        return (
            f'out of memory ({message[:300]}); use more devices, or less at once: '
            'rl.microbatch, rl.generation_batch and evaluation.batch in reinforcement learning, '
            'base.batch_size in pretrain, convert.batch_size in convert'
        )
    return None


def _parse(arguments: list[str]) -> list[str]:
    """Parses with absl; a configuration that cannot be used also gives an error of one line."""
    try:
        words = flags.FLAGS(arguments)
    except UnusableConfig as error:
        distributed.fail(str(error))
    except (flags.Error, KeyError, OSError, TypeError, ValueError) as error:
        distributed.fail(explained(error, arguments))
    if words[1:]:
        distributed.fail(left_over(words[1]))
    return words
