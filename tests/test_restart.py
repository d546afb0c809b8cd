"""A start that cannot go on says so before anything is computed; no start here computes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from configs import countdown
from spg_jax import sharding, train
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.models.transformer import TransformerConfig
from spg_jax.process.interruption import Interruption
from spg_jax.runs import policies
from spg_jax.runs.run import Run
from tests.meshes import mesh_of

FIGURES = {'accuracy': 0.5, 'reward': 0.5}
RECORD = {'prompts': {}, 'prompt_length': 8, 'base': FIGURES, 'best': FIGURES | {'step': 0}}
ARRAYS = {'step': jnp.int32(8)}


@pytest.fixture(scope='module')
def policy(tmp_path_factory):
    """A policy on disk, and its directory."""
    tokenizer = WordTokenizer(['1', '2', '+'])
    config = TransformerConfig(
        vocab_size=tokenizer.size, width=8, layers=1, heads=2, kv_heads=2, mlp_width=8
    )
    made = policies.make_policy(config, tokenizer)
    shapes = sharding.abstract_params(made.model)
    variables = {'params': jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)}
    directory = tmp_path_factory.mktemp('policy') / 'best'
    policies.save_policy(directory, variables, config, tokenizer, {})
    return made, directory


def start_after(workdir, monkeypatch, base, origins_now, **record):
    """The start of a run of eight updates that has a checkpoint of the last of them."""
    run = Run(workdir, keep=2)
    for _ in range(8):
        run.push({})
    run.flush()
    run._metrics.last_row |= record.pop('last_row', {})
    run.save(ARRAYS, **RECORD, **record)
    run.close()
    monkeypatch.setattr(train, 'find_or_make_base', lambda *_: base)
    monkeypatch.setattr(train, 'prepare', lambda *_: (None, SimpleNamespace(validation=[]), None))
    monkeypatch.setattr(train, 'origins_of', lambda *_: origins_now)

    def restore(run, *_):
        run.restore(lambda _: ARRAYS)
        return None, None

    monkeypatch.setattr(train, 'restore', restore)
    config = countdown.get_config('tiny')
    config.train.steps = 8
    return train.train(config, workdir, mesh_of(), Interruption())


def test_a_run_that_only_skipped_is_not_finished_at_its_second_start(policy, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match='8 non-finite updates in a row') as error:
        start_after(tmp_path, monkeypatch, policy[1], {}, last_row={'skipped_in_a_row': 8})
    assert '\n' not in str(error.value) and not (tmp_path / 'result.json').exists()


@pytest.mark.parametrize(
    ('key', 'words'), [('problems', 'set of problems'), ('base_policy', 'base policy')]
)
def test_a_run_that_began_with_other_data_is_refused(policy, tmp_path, monkeypatch, key, words):
    with pytest.raises(ValueError, match=f'{tmp_path} began with another {words}') as error:
        start_after(tmp_path, monkeypatch, policy[1], {key: 'new'}, origins={key: 'old'})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('record', [{}, {'origins': {'problems': 'same'}}])
def test_the_same_data_and_an_older_record_go_on(policy, tmp_path, monkeypatch, record):
    """They get as far as the order of the prompts, which is missing here."""
    with pytest.raises(AttributeError, match="'prompts'"):
        start_after(tmp_path, monkeypatch, policy[1], {'problems': 'same'}, **record)


def restore(directory, policy):
    """As at a start, of a run whose checkpoints nobody may read before its best policy."""
    run = SimpleNamespace(directory=directory, restore=lambda _: pytest.fail('read a checkpoint'))
    return train.restore(run, None, None, None, SimpleNamespace(policy=policy), mesh_of())


def test_a_best_policy_that_is_gone_is_noticed_first(policy, tmp_path):
    with pytest.raises(FileNotFoundError, match='best is gone, .*; restore it') as error:
        restore(tmp_path, policy[0])
    assert '\n' not in str(error.value)


def test_a_best_policy_that_is_damaged_is_noticed_first(policy, tmp_path):
    made, directory = policy
    directory.rename(tmp_path / 'best')
    try:
        file = max(
            (tmp_path / 'best' / 'params').rglob('d/*'), key=lambda path: path.stat().st_size
        )
        file.write_bytes(file.read_bytes()[:50])
        with pytest.raises(ValueError, match='best/params cannot be read') as error:
            restore(tmp_path, made)
        assert '\n' not in str(error.value)
    finally:
        (tmp_path / 'best').rename(directory)
