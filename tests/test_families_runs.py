"""Tiny checkpoints of other families in runs: import, train adapters, export, import."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

from spg_jax.assembly import assemble, fit_to_model
from spg_jax.export import export
from spg_jax.models import weights
from spg_jax.models.families import read_config
from spg_jax.models.lora import COLLECTION
from spg_jax.models.policy import Policy
from spg_jax.process.interruption import Interruption
from spg_jax.rl.evaluator import Evaluator
from spg_jax.runs import policies
from spg_jax.runs.preparation import prepare
from spg_jax.sharding import abstract_params
from spg_jax.train import train
from tests import adapted
from tests.meshes import mesh_of
from tests.published import END, MASK, save_tokenizer

REFERENCE = Path(__file__).parent / 'reference' / 'families'
IDS = {'vocab_size': 256, 'mask_token_id': MASK, 'eos_token_id': END, 'pad_token_id': END}
# A block of three tokens as in the run of adapters, and one layer, since each kind of layer is
# compiled anew. tests/models/test_families.py has the layers without experts of a mixture, whose
# adapters it merges too.
SIZES = {
    'tiny_llada2_moe': {'num_hidden_layers': 1, 'first_k_dense_replace': 0, 'block_length': 3},
    'tiny_dream': {'num_hidden_layers': 1},
}


def write_checkpoint(directory: Path, name: str) -> None:
    """A checkpoint of random parameters with the published names, for the tokenizer of the
    tests."""
    directory.mkdir(parents=True)
    contents = json.loads((REFERENCE / name / 'config.json').read_text())
    (directory / 'config.json').write_text(json.dumps(contents | IDS | SIZES.get(name, {})))
    save_tokenizer(directory)
    config, _ = read_config(directory / 'config.json')
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        scale = 1.0 if len(shape) == 1 else 1 / math.sqrt(shape[-1])  # of norms, and of kernels
        return (scale * rng.normal(1.0 * (len(shape) == 1), 1.0, shape)).astype(np.float32)

    shapes = weights.tensor_shapes(config)
    save_file({key: draw(shape) for key, shape in shapes.items()}, directory / 'model.safetensors')


def config_in(root: Path, name: str):
    config = adapted.get_config()
    write_checkpoint(root / 'published', name)
    (root / 'wording.txt').write_text('{numbers} {target}')
    config.base.checkpoint = str(root / 'published')
    config.task.prompt_template = str(root / 'wording.txt')
    config.lora.update(dropout=0.0, targets=('query', 'key', 'value', 'attention_out', 'down'))
    return config


def random_adapters(policy: Policy, mesh: Mesh):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            rng.normal(0, 0.1, leaf.shape).astype(np.float32), leaf.sharding
        ),
        abstract_params(policy.model, mesh, collection=COLLECTION),
    )


@pytest.mark.parametrize(
    ('name', 'sizes'), [('tiny_llada2_moe', (1, 1, 2)), ('tiny_dream', (1, 1, 1))]
)
def test_a_checkpoint_learns_and_comes_out_again(tmp_path, monkeypatch, name, sizes):
    """One update of SPG by the programs of a run: import, adapters, export, import.

    The mixture learns on a mesh that splits experts, from completions that it samples on the grid
    of its blocks; tests/models/test_families.py also splits rows and widths. Dream has adapters
    that are made up, since its shift is in tests/rl/test_prompt_grid.py, and of an update only what
    reads the model sees a family. LLaDA-MoE has nothing that these two do not have. The loop around
    the programs sees no family; tests/test_adapted_run.py has it, and the export of adapters alone,
    whose names are in tests/models/test_families.py.
    """
    adapted.simplify(monkeypatch)
    config, mesh = config_in(tmp_path, name), mesh_of(*sizes)
    config.corruption.draws = 1  # The loss over draws sees no family; tests/rl has several.
    best, published = tmp_path / 'best', tmp_path / 'published'
    with jax.set_mesh(mesh):
        parts = fit_to_model(config, assemble(config), policies.model_of_policy(published))
        if name == 'tiny_llada2_moe':
            state, _, programs = prepare(config, parts, published, mesh, planned_steps=1)
            policy, tokenizer = programs.policy, programs.tokenizer
            rollout, texts = programs.collect(state, next(programs.prompts), 0)
            assert len(texts) == 8 and np.any(np.asarray(rollout.reward) == 1)
            state, _ = programs.update(state, rollout)
            variables = state.variables
        else:
            policy, tokenizer, variables = policies.load_policy(published, mesh)
            policy = replace(policy, config=replace(policy.config, lora=parts.lora))
            variables |= {COLLECTION: random_adapters(policy, mesh)}
        policies.save_policy(best, variables, policy.config, tokenizer, {}, published)
    factors = load_file(best / 'adapter' / 'adapter_model.safetensors')
    assert factors and all(np.any(x != 0) for x in factors.values())
    expected, before = adapted.logits(best), adapted.logits(published, adapted_as=best)
    assert np.abs(expected - before).max() > 1e-3
    export(best, published, tmp_path / 'merged', whole=True)
    assert_allclose(adapted.logits(tmp_path / 'merged', adapted_as=best), expected, atol=1e-4)
    old, new = (load_file(path / 'model.safetensors') for path in (published, tmp_path / 'merged'))
    assert old.keys() == new.keys()
    changed = {tensor for tensor in old if not np.array_equal(old[tensor], new[tensor])}
    modules = {factor.split('.lora_')[0].removeprefix('base_model.model.') for factor in factors}
    assert changed == {f'{module}.weight' for module in modules}
    assert not any('.experts.' in tensor for tensor in changed)


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
