"""Reinforcement learning for masked diffusion language models in JAX."""

import os
import signal
import sys

# Python runs this file first when it is told to run `python -m spg_jax.NAME`. The imports of a
# command take seconds, and until `process.cli.run` takes over, Ctrl-C would print their traceback.
if sys.argv[:1] == ['-m'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

    def _leave(*_: object) -> None:
        try:
            os.write(2, b'interrupted\n')
        finally:
            os._exit(130)

    signal.signal(signal.SIGINT, _leave)
