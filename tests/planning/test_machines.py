"""Machines by their names, and names of no machine."""

import importlib.util

import pytest

from spg_jax.planning.machines import LISTED, find_machine


def test_listed_machines_have_the_chips_their_names_say():
    machines = {name: find_machine(name) for name in LISTED}
    assert [machine.count for machine in machines.values()] == [8, 16, 8, 4, 1, 8]
    for name, machine in machines.items():
        assert (machine.devices is None) == (machine.chip.platform == 'cuda')
        if machine.devices:
            assert len(machine.devices) == machine.count, name


@pytest.mark.parametrize(
    ('topology', 'message'),
    [
        ('v9:2x2', "no chip 'v9'"),
        ('v5e', "no shape ''"),
        ('v5e:3x3', 'not divisible'),
        ('v5e:two', "no shape 'two'"),
        ('h100:2x2', 'GPUs are counted; use one such as h100:8'),
        ('a100:0', "no shape '0'"),
    ],
)
def test_a_machine_that_does_not_exist_is_one_line_with_one_that_does(topology, message):
    with pytest.raises(ValueError, match=message) as error:
        find_machine(topology)
    assert topology in str(error.value) and '\n' not in str(error.value)
    assert 'use one such as' in str(error.value)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu.* not installed; pip install '.\[plan\]'"):
        find_machine('v5e:2x2')
    assert find_machine('h100:1').count == 1
