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
# the tests as on a processor without AVX-512.
os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'
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

try:  # JAX does not promise that this is there. Without it the tests take longer.
    from jax._src import compiler
except ImportError:
    compiler = None

from tests import processes  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
if not ON_CPUS:  # Their products of float32 numbers would keep fewer bits.
    jax.config.update('jax_default_matmul_precision', 'highest')

_OPTIMIZATIONS_OFF = 'jax_disable_most_optimizations'
_compile_options = getattr(compiler, 'get_compile_options', None)


def _quick_options(*arguments, backend=None, **options):
    """The options of a compilation. Without most optimizations, XLA's older emitters make the code
    of fusions, because the newer ones would take two thirds of the time that is left."""
    if jax.config.read(_OPTIMIZATIONS_OFF) and backend is not None and backend.platform == 'cpu':
        overrides = options.get('env_options_overrides') or {}
        options['env_options_overrides'] = {'xla_cpu_use_fusion_emitters': False} | overrides
    return _compile_options(*arguments, backend=backend, **options)


if _compile_options:
    # JAX offers such options by program only, or in XLA_FLAGS, which all programs here would share.
    compiler.get_compile_options = _quick_options


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Compiles a test's programs, and those of the fixtures it is first to ask for, without most
    optimizations, which takes less time, unless the test is marked `compiled_as_users_do`."""
    off = item.get_closest_marker('compiled_as_users_do') is None
    if jax.config.read(_OPTIMIZATIONS_OFF) != off:
        jax.config.update(_OPTIMIZATIONS_OFF, off)
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
    return processes.SHARED / 'data'


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    processes.end_all()


def pytest_collection_modifyitems(items):
    """Whole runs first: they take longest, and last they would leave a worker idle."""
    long = ('test_train.py', 'test_going_on.py', 'test_readme.py')
    items.sort(key=lambda item: item.path.name not in long)
