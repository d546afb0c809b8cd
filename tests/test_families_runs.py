"""Whole runs on tiny checkpoints of other families: import, train adapters, export, import."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from spg_jax.assembly import assemble, fit_to_model
from spg_jax.export import export
from spg_jax.models import weights
from spg_jax.models.families import read_config
from spg_jax.models.transformer import Transformer
from spg_jax.process.interruption import Interruption
from spg_jax.rl.evaluator import Evaluator
from spg_jax.runs import policies
from spg_jax.sharding import init_params
from spg_jax.train import train
from tests import adapted
from tests.meshes import mesh_of
from tests.published import END, MASK, save_tokenizer

REFERENCE = Path(__file__).parent / 'reference' / 'families'
IDS = {'vocab_size': 256, 'mask_token_id': MASK, 'eos_token_id': END, 'pad_token_id': END}
# The published number of experts, and names; a block of three tokens as in the run of adapters.
SIZES = {
    'tiny_llada2_moe': {'num_experts': 256, 'num_experts_per_tok': 8, 'n_group': 8}
    | {'topk_group': 4, 'num_hidden_layers': 3, 'block_length': 3},
    'tiny_llada_moe': {'num_experts': 64, 'num_experts_per_tok': 8},
    'tiny_dream': {},
    'tiny_qwen2/untied': {},
}


def write_checkpoint(directory: Path, name: str) -> None:
    """A checkpoint of random parameters for the tokenizer of the tests, written by our export."""
    source = directory.with_name(directory.name + '_source')
    source.mkdir(parents=True)
    contents = json.loads((REFERENCE / name / 'config.json').read_text())
    (source / 'config.json').write_text(json.dumps(contents | IDS | SIZES[name]))
    save_tokenizer(source)
    config, _ = read_config(source / 'config.json')
    params = init_params(Transformer(config), jax.random.key(0), mesh_of())
    weights.save_checkpoint(directory, params, source)
    shutil.rmtree(source)


def config_in(root: Path, name: str):
    config = adapted.get_config()
    write_checkpoint(root / 'published', name)
    (root / 'wording.txt').write_text('{numbers} {target}')
    config.base.checkpoint = str(root / 'published')
    config.task.prompt_template = str(root / 'wording.txt')
    config.lora.update(dropout=0.0, targets=('query', 'key', 'value', 'attention_out', 'down'))
    return config


def logits(directory, adapter=None):
    with jax.set_mesh(mesh_of()):
        policy, _, variables = policies.load_policy(directory, mesh_of(), adapter)
        tokens = np.random.default_rng(0).integers(5, 200, (4, 12)).astype(np.int32)
        hidden = jax.jit(policy.hidden)(variables, tokens, np.ones((4, 12), bool))
        return np.asarray(jax.jit(policy.unembed)(variables, hidden))


@pytest.mark.parametrize('name', ['tiny_llada2_moe', 'tiny_dream'])
def test_a_checkpoint_learns_and_comes_out_again(tmp_path, monkeypatch, name):
    """Two updates of SPG with rollouts, on a mesh that splits experts. LLaDA-MoE has nothing that
    these two do not have; the test below evaluates."""
    adapted.simplify(monkeypatch)
    adapted.skip_evaluation(monkeypatch)
    config, mesh = config_in(tmp_path, name), mesh_of(1, 2, 2)
    with jax.set_mesh(mesh), Interruption() as interruption:
        assert train(config, tmp_path / 'run', mesh, interruption)
    best, published = tmp_path / 'run' / 'best', tmp_path / 'published'
    factors = load_file(best / 'adapter' / 'adapter_model.safetensors')
    assert factors and all(np.any(x != 0) for x in factors.values())
    expected, before = logits(best), logits(published)
    assert np.abs(expected - before).max() > 1e-3
    export(best, published, tmp_path / 'peft', whole=False)
    assert_array_equal(logits(published, tmp_path / 'peft'), expected)
    export(best, published, tmp_path / 'merged', whole=True)
    assert_allclose(logits(tmp_path / 'merged'), expected, atol=1e-4)
    old, new = (load_file(path / 'model.safetensors') for path in (published, tmp_path / 'merged'))
    assert old.keys() == new.keys()
    changed = {tensor for tensor in old if not np.array_equal(old[tensor], new[tensor])}
    assert changed and not any('.experts.' in tensor for tensor in changed)


def test_an_autoregressive_model_is_measured_and_not_trained(tmp_path, monkeypatch):
    adapted.simplify(monkeypatch)
    config = config_in(tmp_path, 'tiny_qwen2/untied')
    parts, mesh = assemble(config), mesh_of(2, 1, 1)
    with jax.set_mesh(mesh):
        policy, tokenizer, variables = policies.load_policy(tmp_path / 'published', mesh)
        evaluator = Evaluator(policy, parts.evaluation_task, tokenizer, parts.evaluation, mesh)
        assert evaluator.report(variables, adapted.PROBLEMS)['total'] == 8
        tokens, step = evaluator.trace(variables, adapted.PROBLEMS[0])
        assert tokens.shape == (6,) and step[0] == 0
        with Interruption() as interruption, pytest.raises(ValueError, match='autoregressive') as e:
            train(config, tmp_path / 'run', mesh, interruption)
    assert '\n' not in str(e.value)


def test_parts_that_do_not_fit_the_model_are_refused(tmp_path):
    config = config_in(tmp_path, 'tiny_llada2_moe')
    model = policies.model_of_policy(tmp_path / 'published')
    assert fit_to_model(config, assemble(config), model).lora == assemble(config).lora
    config.evaluation.block_length = 6
    with pytest.raises(ValueError, match='block_length is 6, but .* see blocks of 3; set'):
        fit_to_model(config, assemble(config), model)
    config.evaluation.block_length = 3
    config.lora.targets = ('query', 'down')
    with pytest.raises(ValueError, match='queries, keys and values of this model are one kernel'):
        fit_to_model(config, assemble(config), model)
