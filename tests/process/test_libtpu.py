"""Whether a machine has no TPU is only said where it is certain."""

import pytest

from spg_jax.process import libtpu

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ('makers', 'absent'),
    [
        (['0x1af4', '0x8086'], True),
        (['0x8086', '0x1ae0'], False),  # Google's: a TPU, or a disk of its cloud
        ([], False),  # a container that is shown no devices
    ],
)
def test_a_tpu_is_absent_where_devices_are_seen_and_none_is_googles(tmp_path, makers, absent):
    for i, maker in enumerate(makers):
        device = tmp_path / f'0000:00:{i:02}.0'
        device.mkdir()
        (device / 'vendor').write_text(maker + '\n')
    assert libtpu.surely_absent(tmp_path) is absent
