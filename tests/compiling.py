"""How tests compile: without most optimizations, which takes less time, unless a test says
otherwise."""

import jax

try:  # JAX does not promise that this is there. Without it the tests take longer.
    from jax._src import compiler
except ImportError:
    compiler = None

OPTIMIZATIONS_OFF = 'jax_disable_most_optimizations'
# The same as an environment variable, for processes that a test starts.
QUICKLY = {OPTIMIZATIONS_OFF.upper(): '1'}


def use_older_emitters_where_optimizations_are_off() -> None:
    """XLA's older emitters make the code of fusions where most optimizations are off, because the
    newer ones would take two thirds of the time that is left.

    JAX offers such options by program only, or in XLA_FLAGS, which all programs would share.
    """
    options_of = getattr(compiler, 'get_compile_options', None)
    if options_of is None:
        return

    def quick_options(*arguments, backend=None, **options):
        off = jax.config.read(OPTIMIZATIONS_OFF)
        if off and backend is not None and backend.platform == 'cpu':
            overrides = options.get('env_options_overrides') or {}
            options['env_options_overrides'] = {'xla_cpu_use_fusion_emitters': False} | overrides
        return options_of(*arguments, backend=backend, **options)

    compiler.get_compile_options = quick_options
