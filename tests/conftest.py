"""Every test runs on 8 virtual CPU devices, and no array is broadcast to another's rank by
accident."""

import os

# Before jax starts: the flag is read once.
os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'
)
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Most of a test's time is the compiler's; tests of memory turn its optimizations on again.
jax.config.update('jax_disable_most_optimizations', True)


def pytest_collection_modifyitems(items):
    """Whole runs first: they take longest, and last they would leave a worker idle."""
    items.sort(key=lambda item: item.path.name != 'test_train.py')
