"""One update of each `:tiny` preset, from stored weights, tokens and masks, against stored results.

Nothing random is drawn here, so the results hold on every processor and with every version of JAX.
Where a change of the results is meant, `python -m tests.test_golden_update` records them anew; the
commit then says why they changed.
"""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax import sharding
from spg_jax.assembly import assemble, model_of
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.diffusion.corruption import Draws, scored_positions
from spg_jax.rl.advantages import group_advantages
from spg_jax.rl.gradient import make_gradient
from spg_jax.rl.rollout import Rollout
from spg_jax.runs.policies import make_policy
from spg_jax.training import optimizers
from spg_jax.training.train_state import apply_gradient, initial_state
from tests.meshes import mesh_of

TASKS = ('countdown', 'sudoku')
RECORD = 'if this change is meant, record it with `python -m tests.test_golden_update`'
Arrays = dict[str, np.ndarray]


def stored_file(task: str) -> Path:
    return Path(__file__).parent / 'reference' / f'golden_update_{task}.npz'


def tiny_parts(task: str):
    """The parts of a task's tiny preset, its policy and the number of its updates."""
    config = importlib.import_module(f'configs.{task}').get_config('tiny')
    parts = assemble(config)
    tokenizer = WordTokenizer(parts.task.vocabulary)
    policy = make_policy(model_of(config, tokenizer.size, 'cpu'), tokenizer)
    return parts, policy, config.train.steps


def invented_inputs(task: str) -> Arrays:
    """Weights, a rollout and the masks of its draws, from NumPy's generator."""
    parts, policy, _ = tiny_parts(task)
    rng = np.random.default_rng(0)
    rows, P, C = parts.batching.rows, parts.prompt_lengths[-1], parts.sampling.length
    V, M = policy.config.vocab_size, parts.objective.draws
    completion = rng.integers(3, V, (rows, C)).astype(np.int32)
    completion[np.arange(C) >= rng.integers(1, C + 2, (rows, 1))] = policy.eos_id
    prompt_mask = np.arange(P) >= rng.integers(0, 3, (rows, 1))
    masked = rng.random((rows, M, P + C)) < 0.5
    masked[:, :, :P] &= prompt_mask[:, None]
    masked[:, :, P] = True  # every draw masks a token that is scored
    inputs = {
        'prompt': rng.integers(3, V, (rows, P)).astype(np.int32),
        'prompt_mask': prompt_mask,
        'completion': completion,
        'masked': masked,
        'reward': rng.integers(0, 3, rows).astype(np.float32) / 2,
    }
    for name, shape in parameter_shapes(policy).items():
        fan_in = shape[-2] if len(shape) > 1 else shape[-1]
        scale = 0.1 if 'norm' in name else fan_in**-0.5
        values = rng.normal(size=shape) * scale + ('norm' in name)
        inputs[f'params/{name}'] = values.astype(np.float32)
    return inputs


def parameter_shapes(policy) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(sharding.abstract_params(policy.model))
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape for path, leaf in leaves
    }


def update_once(task: str, inputs: Arrays) -> Arrays:
    """Loss, gradient, and the parameters after the first step of the optimiser."""
    parts, policy, steps = tiny_parts(task)
    structure = jax.tree.structure(sharding.abstract_params(policy.model))
    names = list(parameter_shapes(policy))
    params = jax.tree.unflatten(structure, [jnp.asarray(inputs[f'params/{n}']) for n in names])
    rows = len(inputs['reward'])
    rollout = Rollout(
        prompt=inputs['prompt'],
        prompt_mask=inputs['prompt_mask'],
        completion=inputs['completion'],
        scored=scored_positions(inputs['completion'], policy.eos_id),
        commit_step=np.zeros(inputs['completion'].shape, np.int32),
        reward=inputs['reward'],
        advantage=group_advantages(inputs['reward'], parts.batching.group_size),
        example_id=np.arange(rows, dtype=np.uint32),
    )
    blocks = np.zeros(inputs['masked'].shape[:2], np.int32)
    draws = Draws(masked=inputs['masked'], block=blocks)
    optimizer = optimizers.for_rl(parts.optimizer, steps)
    state = initial_state({'params': params}, optimizer, policy, mesh_of(), average=False)
    gradient_of = jax.jit(
        make_gradient(policy, parts.objective, microbatch=rows // 2, draws_per_pass=0)
    )
    loss, gradient, _ = gradient_of(state.trained, {}, rollout, draws)
    state, _ = jax.jit(apply_gradient, static_argnums=3)(state, gradient, loss, optimizer)
    results = {'loss': np.asarray(loss)}
    for kind, tree in (('gradient', gradient), ('updated', state.trained)):
        leaves = jax.tree.leaves(tree['params'])
        results |= {f'{kind}/{name}': np.asarray(x) for name, x in zip(names, leaves, strict=True)}
    return results


@pytest.mark.parametrize(
    'task', [pytest.param('countdown', marks=pytest.mark.compiled_as_users_do), 'sudoku']
)
def test_an_update_is_the_recorded_one(task):
    with np.load(stored_file(task)) as file:
        stored = {name: file[name] for name in file.files}
    results = update_once(task, stored)
    assert_allclose(results['loss'], stored['loss'], rtol=1e-5, err_msg=RECORD)
    gradients = [name for name in results if name.startswith('gradient/')]
    largest = max(np.abs(stored[name]).max() for name in gradients)
    for name in gradients:
        gradient = stored[name]
        assert_allclose(results[name], gradient, rtol=0, atol=1e-5 * largest, err_msg=RECORD)
        # The first step of AdamW is the sign of the gradient, which rounding decides near zero.
        certain = np.abs(gradient) > 1e-4 * largest
        updated = name.replace('gradient/', 'updated/')
        after, expected = results[updated][certain], stored[updated][certain]
        assert_allclose(after, expected, rtol=0, atol=2e-7, err_msg=RECORD)


if __name__ == '__main__':
    for task in TASKS:
        inputs = invented_inputs(task)
        np.savez_compressed(stored_file(task), **inputs, **update_once(task, inputs))
        print(f'{stored_file(task)}: recorded')
