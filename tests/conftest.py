"""Every test runs on 8 virtual CPU devices, and no array is broadcast to another's rank by
accident."""

import atexit
import os
import shutil
import tempfile

# Before jax starts: flags are read once.
os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'
)
os.environ['JAX_PLATFORMS'] = 'cpu'
# One for this run of the tests, both workers and the processes they start: most of a test's time is
# the compiler's, and many compile the same program.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    compiled = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = compiled
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests of memory turn its optimizations on again.
jax.config.update('jax_disable_most_optimizations', True)


def pytest_collection_modifyitems(items):
    """Whole runs first: they take longest, and last they would leave a worker idle."""
    long = ('test_train.py', 'test_distributed.py')
    items.sort(key=lambda item: item.path.name not in long)
