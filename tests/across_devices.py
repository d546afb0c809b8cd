"""What a published policy with adapters computes on a mesh, as plain arrays.

As a program it is one of several processes: `python -m tests.across_devices CHECKPOINT OUT`.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.models.lora import LoRA
from spg_jax.models.policy import with_adapters
from spg_jax.process import distributed
from spg_jax.random import Purpose, example_keys
from spg_jax.rl.learner import make_update
from spg_jax.rl.rollout import make_generate
from spg_jax.runs import policies
from spg_jax.training import optimizers
from spg_jax.training.train_state import initial_state, shardings_of
from tests.rl.conftest import learning, random_rollout

ROWS, PROMPT = 8, 4


def settings():
    config = default_config()
    config.sampling.update(prompt_length=PROMPT, length=12, steps=12, block_length=4)
    config.rl.update(group_size=4, prompts=2, microbatch=8)
    config.optimizer.update(learning_rate=1e-3, warmup_fraction=0.0)
    return config


def outcome(checkpoint: Path, mesh: Mesh) -> dict[str, np.ndarray]:
    """Imported parameters, logits, completions and adapters after an SPG update; every process
    brings its rows and gets everything."""
    config = settings()
    own = sharding.own_rows(mesh, ROWS)
    rows = jax.tree.map(lambda x: np.asarray(x)[own], random_rollout(ROWS, PROMPT, 12))
    with jax.set_mesh(mesh):
        policy, _, variables = policies.load_policy(checkpoint, mesh)
        found = fetched(mesh, {'params': variables['params']})
        known = np.isin(np.arange(ROWS), own)
        found['merged'] = distributed.merge(np.where(known, np.arange(ROWS), -1), known)
        # Two kernels, one of each layout; their masks cost more to compile than all the rest.
        lora = LoRA(rank=4, alpha=8.0, dropout=0.1, targets=('query', 'down'))
        policy, variables = with_adapters(policy, variables, lora, 0, mesh)
        variables['lora'] = jax.jit(_grown)(variables['lora'])
        rollout = sharding.put_batch(mesh, rows)
        keys = jax.jit(example_keys, static_argnums=(0, 1, 2))(
            0, Purpose.SAMPLE, 3, rollout.example_id
        )
        logits = jax.jit(policy.completion_logits)(
            variables, rollout.prompt, rollout.prompt_mask, rollout.completion
        )
        generate = make_generate(policy, assemble(config).sampling)
        tokens = generate(variables, rollout.prompt, rollout.prompt_mask, keys).tokens
        found |= fetched(mesh, {'logits': logits, 'tokens': tokens})
        optimizer = optimizers.for_rl(assemble(config).optimizer, 10)
        state = initial_state(variables, optimizer, policy, mesh, average=False)
        update = make_update(policy, *learning(config, optimizer), shardings_of(state))
        state, _ = update(state, rollout)
        return found | fetched(mesh, {'updated': state.trained})


def fetched(mesh, tree):
    """Name -> the whole array, in every process."""
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(tree)
    leaves = jax.tree_util.tree_leaves_with_path(whole)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _grown(adapters):
    """Adapters that change something: none of their factors is zero."""
    waves = lambda x: 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)  # noqa: E731
    return jax.tree.map(lambda x: x + waves(x), adapters)


if __name__ == '__main__':
    distributed.start()
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    found = outcome(Path(sys.argv[1]), mesh)
    if distributed.is_leader():
        np.savez(sys.argv[2], **found)
