"""A training that goes on elsewhere, in other processes or further ends as one never cut."""

import signal

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from spg_jax.process.interruption import Interruption
from spg_jax.train import train
from spg_jax.training import optimizers
from tests import adapted, compiling
from tests.meshes import mesh_of
from tests.processes import finish_all, start_pair, wait_until

STEPS = 6


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('going_on')
    return root, adapted.prepare(root)


def settings_of(root, steps):
    """A run whose rate warms up in its first update, however many there are.

    At the rate of other tests AdamW amplifies rounding errors beyond 1e-5 in these updates. Dropout
    would double what compiling costs; tests/rl/test_adapters.py has it in pieces.
    """
    return root[1] | {
        'train.steps': steps,
        'optimizer.warmup_fraction': 1 / steps,
        'optimizer.learning_rate': 3e-3,
        'lora.dropout': 0.0,
    }


def config_of(root, steps):
    config = adapted.get_config()
    config.update_from_flattened_dict(settings_of(root, steps))
    return config


PROGRAMS = {}  # of the starts in this process, which all make the same updates on one device


def start(config, workdir):
    """A start in this process, whose programs for evaluation are not compiled."""
    mesh = mesh_of()
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        adapted.simplify(patch)
        adapted.skip_evaluation(patch)
        adapted.share_programs(patch, PROGRAMS)
        with Interruption() as stop:
            return train(config, workdir, mesh, stop)


def adapters_of(workdir):
    return load_file(workdir / 'best' / 'adapter' / 'adapter_model.safetensors')


@pytest.fixture(scope='module')
def whole(root):
    assert start(config_of(root, STEPS), root[0] / 'whole')
    return adapters_of(root[0] / 'whole')


@pytest.fixture(scope='module')
def cut_in_two_processes(root, tmp_path_factory):
    """A run on the devices of two processes, of which each holds one half of what is split over
    `fsdp`, and of which one gets a SIGTERM."""
    workdir = tmp_path_factory.mktemp('cut')
    mesh = {'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 1}
    command = adapted.command(workdir, settings_of(root, STEPS) | mesh)
    pair = start_pair(*command, devices=1, **compiling.QUICKLY)  # as this process compiles
    wait_until((workdir / 'checkpoints' / '1').exists, *pair)
    pair[1].send_signal(signal.SIGTERM)
    return workdir, finish_all(pair)


def test_a_signal_to_one_of_two_processes_saves_and_stops_both(cut_in_two_processes):
    workdir, ((code, out, error), (other_code, other_out, _)) = cut_in_two_processes
    assert code == other_code == 0, error
    assert 'saved; run the same command to go on' in out and not other_out.count('saved')
    assert not (workdir / 'result.json').exists(), 'the signal came too late'


def test_a_run_goes_on_on_one_device(root, whole, cut_in_two_processes):
    """tests/runs/test_checkpoints.py goes from one device to several."""
    workdir, _ = cut_in_two_processes
    assert start(config_of(root, STEPS), workdir)
    texts, expected = (x / 'completions.jsonl' for x in (workdir, root[0] / 'whole'))
    assert texts.read_text() == expected.read_text()
    moved = adapters_of(workdir)
    assert moved.keys() == whole.keys()
    for name, values in whole.items():
        assert_allclose(moved[name], values, atol=1e-5, err_msg=name)


def test_a_finished_run_that_is_made_longer_keeps_its_warm_up(root, whole, tmp_path, monkeypatch):
    """Every start makes its schedule for the updates that were planned first; the updates
    themselves are those of `whole`, which also warms up in its first."""
    for_rl, planned = optimizers.for_rl, []

    def noted(settings, total_steps, *more):
        planned.append(total_steps)
        return for_rl(settings, total_steps, *more)

    monkeypatch.setattr(optimizers, 'for_rl', noted)
    config = config_of(root, STEPS - 1)
    assert start(config, tmp_path)
    short = adapters_of(tmp_path)
    config.train.steps = STEPS
    assert start(config, tmp_path)
    assert set(planned) == {STEPS - 1}
    longer = adapters_of(tmp_path)
    assert any(np.any(longer[name] != short[name]) for name in short)
    for name, values in whole.items():
        assert_array_equal(longer[name], values, err_msg=name)
