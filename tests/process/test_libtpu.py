"""A machine counts as one without a TPU only if that is certain."""

import pytest

from spg_jax.process import libtpu

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ('vendors', 'absent'),
    [
        (['0x1af4', '0x8086'], True),
        (['0x8086', '0x1ae0'], False),  # a device of Google: a TPU, or a disk of its cloud
        ([], False),  # a container that shows no devices
    ],
)
def test_a_tpu_is_absent_where_devices_are_seen_and_none_is_googles(tmp_path, vendors, absent):
    for i, vendor in enumerate(vendors):
        device = tmp_path / f'0000:00:{i:02}.0'
        device.mkdir()
        (device / 'vendor').write_text(vendor + '\n')
    assert libtpu.surely_absent(tmp_path) is absent
