"""Weights & Biases is asked before any work, and a new training has an id of its own."""

import os
import sys
import types

import jax.numpy as jnp
import pytest

from spg_jax.runs.run import Run
from spg_jax.runs.wandb_log import check_wandb, open_wandb

pytestmark = pytest.mark.fast


class Unreachable(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which notes what it is asked for."""
    module = types.ModuleType('wandb')
    module.api = types.SimpleNamespace(api_key=None)
    module.errors = types.SimpleNamespace(CommError=Unreachable, UsageError=Unreachable)
    module.started, module.mode, module.saved_key = [], 'online', None
    module.setup = lambda: types.SimpleNamespace(
        settings=types.SimpleNamespace(
            mode=os.environ.get('WANDB_MODE', module.mode),
            api_key=module.saved_key,
            base_url='https://api.wandb.ai',
        )
    )

    def init(**options):
        module.started.append(options)
        if module.api.api_key == 'unreachable' and options.get('mode') != 'offline':
            raise Unreachable('no route\nto host')
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    module.init = init
    monkeypatch.setitem(sys.modules, 'wandb', module)
    for name in ('WANDB_MODE', 'WANDB_API_KEY', 'WANDB_IDENTITY_TOKEN_FILE'):
        monkeypatch.delenv(name, raising=False)
    return module


def test_no_key_is_one_line(wandb, monkeypatch):
    """G21."""
    with pytest.raises(ValueError, match='wandb login.*WANDB_MODE=offline') as error:
        check_wandb('proj')
    assert '\n' not in str(error.value)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    check_wandb('proj')


def test_what_wandb_has_been_told_before_counts(wandb):
    """`wandb offline` and `wandb disabled` write a file of settings."""
    for wandb.mode in ('offline', 'disabled'):
        check_wandb('proj')


def test_only_the_process_that_logs_needs_a_key(wandb, monkeypatch):
    monkeypatch.setattr('spg_jax.process.distributed.is_leader', lambda: False)
    check_wandb('proj')


@pytest.mark.parametrize('place', ['environment', 'settings', '.netrc', 'nowhere', 'bad .netrc'])
def test_a_key_is_found_without_what_wandb_deprecates(wandb, monkeypatch, place):
    def read_netrc_auth(host):
        assert host == 'https://api.wandb.ai'
        if place == 'bad .netrc':
            raise Unreachable('too\nshort')
        return 'key' if place == '.netrc' else None

    del wandb.api
    newer = types.SimpleNamespace(read_netrc_auth=read_netrc_auth)
    monkeypatch.setitem(sys.modules, 'wandb.sdk.lib.wbauth', newer)
    if place == 'environment':
        monkeypatch.setenv('WANDB_API_KEY', 'key')
    wandb.saved_key = 'key' if place == 'settings' else None
    if place in ('environment', 'settings', '.netrc'):
        check_wandb('proj')
        return
    with pytest.raises(ValueError, match='`wandb login') as error:
        check_wandb('proj')
    assert '\n' not in str(error.value)


def test_without_a_network_a_line_says_that_it_is_offline(wandb, tmp_path, capsys):
    wandb.api.api_key = 'unreachable'
    open_wandb('proj', tmp_path, 'id', {'rl': {'beta': 1.5}})
    assert [options.get('mode') for options in wandb.started] == [None, 'offline']
    assert wandb.started[-1]['config'] == {'rl': {'beta': 1.5}}
    assert capsys.readouterr().out.count('\n') == 1


def one_update(directory):
    run = Run(directory, keep=1, wandb='proj')
    arrays = {'x': jnp.zeros(3)}
    if run.resumes:
        run.restore(lambda record: arrays)
    run.push({'loss': (jnp.float32(1), jnp.float32(1))})
    run.save(arrays)
    run.close()
    return run.record['wandb_id']


def test_a_training_keeps_its_id_and_another_one_in_its_place_has_another(wandb, tmp_path):
    """G23."""
    wandb.api.api_key = 'key'
    first = one_update(tmp_path / 'a')
    assert one_update(tmp_path / 'a') == first
    other = one_update(tmp_path / 'b')
    assert other != first
    assert [options['id'] for options in wandb.started] == [first, first, other]
