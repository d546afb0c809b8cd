"""One of two processes that agree with each other for ever.

python -m tests.process.waiting FILE
"""

import sys
from pathlib import Path

from spg_jax.process import distributed

if __name__ == '__main__':
    distributed.start()
    while distributed.largest(1):
        Path(sys.argv[1]).touch()
