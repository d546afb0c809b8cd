"""Every test runs on 8 virtual CPU devices, no array is broadcast to another's rank by accident,
and no process outlives the test that started it.

`SPG_JAX_TESTS_ON=accelerator` runs `-m numerical` on the devices that JAX finds instead, in full
precision; tests for which they are too few are skipped. `benchmarks.on_accelerator` sets it."""

import atexit
import os
import shutil
import signal
import tempfile

# Before jax starts: flags are read once. Those of the caller stay: `--xla_cpu_max_isa=AVX2` runs
# the tests as on a processor without AVX-512. The second flag changes no code that is compiled: it
# keeps XLA from cutting a program into parts that threads compile beside each other, which costs a
# tenth more processor time, and every core has a worker already.
os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'
    ' --xla_cpu_parallel_codegen_split_count=1'
)
ON_CPUS = os.environ.get('SPG_JAX_TESTS_ON', 'cpu') == 'cpu'
if ON_CPUS:
    os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.pop('JAX_DISABLE_MOST_OPTIMIZATIONS', None)  # programs started here are a user's
# For this run of the tests, both workers and the processes they start: most of a test's time is the
# compiler's, and many compile the same program. Whole runs share their problems and base policies.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    shared = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, shared, ignore_errors=True)
    os.environ['SPG_JAX_SHARED_BY_TESTS'] = shared
    os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{shared}/compiled'
    # Here smaller programs are not worth a file; entry points keep all of theirs.
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import jax  # noqa: E402
import pytest  # noqa: E402

from spg_jax.process import allocator  # noqa: E402
from tests import compiling, processes  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
if not ON_CPUS:  # Their products of float32 numbers would keep fewer bits.
    jax.config.update('jax_default_matmul_precision', 'highest')

allocator.collect_seldom()
compiling.use_older_emitters_where_optimizations_are_off()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Compiles a test's programs, and those of the fixtures it is first to ask for, without most
    optimizations, which takes less time, unless the test is marked `compiled_as_users_do`."""
    off = item.get_closest_marker('compiled_as_users_do') is None
    if jax.config.read(compiling.OPTIMIZATIONS_OFF) != off:
        jax.config.update(compiling.OPTIMIZATIONS_OFF, off)
        jax.clear_caches()  # which do not tell programs compiled one way from the other
    return (yield)


def _end_with_children(*_) -> None:
    processes.end_all()
    os._exit(143)


# A worker that is told to end, or whose pytest has ended, takes along what its tests have started.
signal.signal(signal.SIGTERM, _end_with_children)
# Under nohup, or in the background of a script, the programs that tests start would inherit that a
# hang-up or Ctrl-C is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(processes.end_all)


@pytest.fixture(scope='session')
def data_dir():
    """The folder of problems that whole runs share; a test that changes it takes a copy."""
    return processes.shared_problems()


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    processes.end_all()


def pytest_collection_modifyitems(items):
    """Whole runs first: they take longest, and last they would leave a worker idle."""
    long = ('test_train.py', 'test_going_on.py')
    items.sort(key=lambda item: item.path.name not in long)
