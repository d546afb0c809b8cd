"""Error messages that rooms share."""

import pytest

from spg_jax.errors import check_one_of, one_line


def test_an_exception_becomes_one_line():
    assert one_line(KeyError('a\n  b')) == "KeyError: 'a\\n b'"
    assert one_line(OSError('no route\n  to host')) == 'OSError: no route to host'


def test_a_value_must_be_known():
    check_one_of('mesh.axis', 'data', ('data', 'fsdp'))
    with pytest.raises(ValueError, match="^mesh.axis is 'rows'; use one of data, fsdp$"):
        check_one_of('mesh.axis', 'rows', iter(('data', 'fsdp')))
    with pytest.raises(ValueError, match="^x is 'dat', perhaps data; use one of data, fsdp$"):
        check_one_of('x', 'dat', ('data', 'fsdp'))
    with pytest.raises(ValueError, match='^x is 5; use one of data, fsdp$'):
        check_one_of('x', 5, ('data', 'fsdp'))
