"""One of two processes that agree with each other for ever.

python -m tests.process.waiting FILE
"""

import sys
from pathlib import Path

from spg_jax.process import distributed

if __name__ == '__main__':
    distributed.HEARTBEAT_SECONDS = 4  # so that tests do not wait
    distributed.start()
    while distributed.largest(1):
        Path(sys.argv[1]).touch()
