"""The compiler and driver of TPUs, libtpu, on machines without a TPU."""

import importlib.util
import os
from pathlib import Path

# On a machine without a TPU libtpu would wait for these facts or complain that they are missing.
# The last variable lets several processes compile at the same time.
_WITHOUT_A_TPU = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',  # Any type will do: a compilation names its topology.
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
_GOOGLE = '0x1ae0'  # Google's vendor id of PCI devices, which are not all TPUs


def is_installed() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec('libtpu') is not None


def work_without_a_tpu() -> None:
    """Lets libtpu compile without a TPU and without complaints; call it before JAX loads libtpu."""
    for name, value in _WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)


def surely_absent(devices: Path = Path('/sys/bus/pci/devices')) -> bool:
    """Whether this machine certainly has no TPU; False if that is uncertain."""
    vendors = [path.read_text().strip() for path in devices.glob('*/vendor')]
    return bool(vendors) and _GOOGLE not in vendors
