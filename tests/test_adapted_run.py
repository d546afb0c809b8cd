"""Adapters on a published checkpoint through a whole run and out again: train, save, resume,
export, load."""

import dataclasses
import itertools
import json
import shutil
import types

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from spg_jax import evaluate, score
from spg_jax import export as export_module
from spg_jax.export import export
from spg_jax.models import weights
from spg_jax.pretrain import pretrain
from spg_jax.process import cli
from spg_jax.process.interruption import Interruption
from spg_jax.rl.evaluator import Evaluator
from spg_jax.runs import policies
from spg_jax.runs.identity import digest_path
from spg_jax.train import train
from tests import adapted
from tests.meshes import mesh_of


def config_in(root):
    config = adapted.get_config()
    config.update_from_flattened_dict(adapted.prepare(root))
    return config


class Cut(Interruption):
    """Asks to stop as soon as it is asked."""

    def requested(self):
        return True


@pytest.fixture(scope='module')
def reads():
    """Directories that the trainings of `run` read parameters from, in turn."""
    return []


@pytest.fixture(scope='module')
def programs():
    """Programs of a run, which its starts share."""
    return {}


@pytest.fixture(scope='module')
def run(tmp_path_factory, reads, programs):
    """Two updates, cut after the first and resumed. tests/test_going_on.py compares such runs with
    others."""
    root = tmp_path_factory.mktemp('adapted')
    config = config_in(root)
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh_of()):
        adapted.simplify(patch)
        adapted.evaluate_without_the_model(patch)
        adapted.share_programs(patch, programs)
        load = weights.load_checkpoint

        def noted(directory, *more, **fields):
            reads.append(directory)
            return load(directory, *more, **fields)

        patch.setattr(weights, 'load_checkpoint', noted)
        with Cut() as cut:
            assert not train(config, root / 'run', mesh_of(), cut)
        with Interruption() as interruption:
            assert train(config, root / 'run', mesh_of(), interruption)
    return root


def test_every_start_reads_its_base_once(run, reads):
    """At 8B a second copy on the devices, to evaluate the best policy, would not fit."""
    assert reads == [run / 'published'] * 2


def test_what_is_reported_is_the_policy_that_validated_best(run, programs, tmp_path, monkeypatch):
    """Here the base, whose new adapters change nothing: the others are worth less."""
    config, reported = config_in(run), []
    worth = itertools.count(0, -1)

    def report(self, variables, problems, transcripts=None):
        reported.append(jax.device_get(variables['lora']))
        return {'accuracy': 0.0, 'reward': 0.0, 'pass_at_1': 0.0, 'scorer': 'none'}

    adapted.simplify(monkeypatch)
    adapted.share_programs(monkeypatch, programs)
    monkeypatch.setattr(
        Evaluator, 'validate', lambda *_: {'accuracy': float(next(worth)), 'reward': 0.0}
    )
    monkeypatch.setattr(Evaluator, 'report', report)
    # Without figures of the base that the run before it has kept, with its own idea of worth.
    monkeypatch.setattr('spg_jax.train.identity_of', lambda *_: None)
    with jax.set_mesh(mesh_of()), Interruption() as interruption:
        assert train(config, tmp_path / 'run', mesh_of(), interruption)
    base, best = reported
    jax.tree.map(assert_array_equal, best, base)


def test_only_adapters_are_saved_and_all_of_them_learned(run):
    best = run / 'run' / 'best'
    weights = load_file(best / 'adapter' / 'adapter_model.safetensors')
    assert len(weights) == 2 * 2 * 2  # factors, targets, layers; others are in test_published_names
    assert all(np.any(x != 0) for x in weights.values())
    assert not (best / 'params').exists()
    saved = sum(path.stat().st_size for path in (run / 'run' / 'checkpoints' / '2').rglob('*'))
    assert saved < (run / 'published' / 'model.safetensors').stat().st_size


@pytest.mark.parametrize('added', [True, False])
def test_an_evaluation_says_which_adapter_was_added(run, tmp_path, monkeypatch, added):
    adapted.simplify(monkeypatch)
    adapted.evaluate_without_the_model(monkeypatch)
    published, adapter = str(run / 'published'), run / 'run' / 'best' / 'adapter'
    policy = dict(workdir='', checkpoint=published, adapter=str(adapter) if added else '')
    asked = dict(
        config=config_in(tmp_path), data='', split='test', samples=None, out=f'{tmp_path}/out'
    )
    monkeypatch.setattr(cli, 'chosen_mesh', lambda _: mesh_of())
    monkeypatch.setattr(cli, 'compile_cache', lambda: None)
    monkeypatch.setattr(evaluate, 'FLAGS', types.SimpleNamespace(**policy, **asked))
    evaluate.main([])
    found = json.loads((tmp_path / 'out' / 'result.json').read_text())['policy']
    expected = {'directory': published, 'digest': ''}
    if added:
        expected['adapter'] = {'directory': str(adapter), 'digest': digest_path(adapter)}
    assert found == expected
    assert score.score(None, [str(tmp_path / 'out')])['total'] == len(adapted.PROBLEMS)


def test_what_is_exported_acts_as_what_was_trained(run):
    best, published = run / 'run' / 'best', run / 'published'
    expected = adapted.logits(best)
    export(best, published, run / 'peft', whole=False)
    assert_array_equal(adapted.logits(published, run / 'peft'), expected)
    export(best, published, run / 'merged', whole=True)
    assert (run / 'merged' / 'tokenizer.json').is_file()
    assert_allclose(adapted.logits(run / 'merged'), expected, atol=1e-5)
    with pytest.raises(ValueError, match='peft exists; give a new directory'):
        export(best, published, run / 'peft', whole=False)


def test_what_started_from_another_run_is_exported_as_that_run_would_be(run, tmp_path, monkeypatch):
    """The first run has adapters, and the second every parameter; only the third is exported."""
    config, best = config_in(tmp_path), run / 'run' / 'best'
    policy, tokenizer, variables = policies.load_policy(best, mesh_of())
    whole = dataclasses.replace(policy.config, lora=None)
    for name, start in (('second', run / 'run'), ('third', tmp_path / 'second')):
        config.base.checkpoint, place = str(start), tmp_path / name / 'best'
        notes = {'config': config.to_dict()}
        policies.save_policy(place, {'params': variables['params']}, whole, tokenizer, notes)
        shutil.copytree(run / 'run' / 'checkpoints', tmp_path / name / 'checkpoints')
        (tmp_path / name / 'config.json').write_text(json.dumps(notes['config']))
        flags = types.SimpleNamespace(workdir=tmp_path / name, out=tmp_path / f'{name} out')
        flags.merge = False
        monkeypatch.setattr(export_module, 'FLAGS', flags)
        export_module.main([])
        found, expected = (adapted.logits(x) for x in (flags.out, run / 'published'))
        assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ('base', 'adapter', 'rank', 'said'),
    [
        ('published', 'run/best/adapter', 8, 'rank 4, .* asks for rank 8; set .*lora.rank=4, or'),
        ('published', 'run/best/adapter', 0, 'rank 4, .* asks for none; set .*lora.rank=4 '),
        ('run/best', '', 8, 'rank 4, .* asks for rank 8; set .*lora.rank=4, or'),
    ],
)
def test_adapters_of_another_rank_are_refused_before_their_base_is_read(
    run, tmp_path, monkeypatch, base, adapter, rank, said
):
    adapted.simplify(monkeypatch)
    monkeypatch.setattr(weights, 'load_checkpoint', lambda *_: pytest.fail('read the weights'))
    config = adapted.get_config()
    config.base.checkpoint = str(run / base)
    adapter_of = str(run / adapter) if adapter else ''
    config.lora.update(rank=rank, adapter=adapter_of)
    with jax.set_mesh(mesh_of()), Interruption() as interruption:
        with pytest.raises(ValueError, match=f'{run / (adapter or base)} has .*{said}') as error:
            train(config, tmp_path, mesh_of(), interruption)
    assert '\n' not in str(error.value)


def test_fine_tuning_every_parameter_does_not_start_from_adapters(run):
    config = config_in(run)
    for rank, message in ((0, 'best has adapters, but with lora.rank 0'), (2, 'asks for rank 2')):
        config.lora.rank = rank
        with Interruption() as interruption, pytest.raises(ValueError, match=message) as error:
            pretrain(config, run / 'tuned', mesh_of(), interruption, run / 'run' / 'best')
        assert '\n' not in str(error.value)


def test_a_base_that_is_gone_is_named(run):
    moved = run / 'moved'
    shutil.copytree(run / 'run' / 'best', moved)
    description = (moved / 'policy.json').read_text()
    (moved / 'policy.json').write_text(description.replace('/published"', '/gone"'))
    with pytest.raises(FileNotFoundError, match='adapts the policy .*gone, which does not exist'):
        policies.load_policy(moved, mesh_of())
    with pytest.raises(ValueError, match='has adapters of its own'):
        policies.load_policy(run / 'run' / 'best', mesh_of(), run / 'run' / 'best' / 'adapter')
