"""The compiler and driver of TPUs on machines that have none."""

import importlib.util
import os
from pathlib import Path

# What it would ask a TPU's machine, or complain about where there is none, and leave to compile to
# several processes at once.
_WITHOUT_A_TPU = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',  # any: a compiler is given a topology by name
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
_GOOGLE = '0x1ae0'  # as maker of a PCI device; not all of them are TPUs


def is_installed() -> bool:
    return importlib.util.find_spec('libtpu') is not None


def work_without_a_tpu() -> None:
    """Lets libtpu compile, and find no chips without complaint; to call before JAX loads it."""
    for name, value in _WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)


def surely_absent(devices: Path = Path('/sys/bus/pci/devices')) -> bool:
    """Whether this machine has no TPU; where that is not certain, False."""
    makers = [path.read_text().strip() for path in devices.glob('*/vendor')]
    return bool(makers) and _GOOGLE not in makers
