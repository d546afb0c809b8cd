"""A run of adapters on the tiny published checkpoint, made cheap: eight problems, and any text with
an odd number of characters earns a reward.

    python -m tests.adapted --config=tests/adapted.py [flags of spg_jax.train]
"""

import os
import runpy
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import countdown
from spg_jax.diffusion.sampling import Completion, SamplingConfig
from spg_jax.models.lora import COLLECTION
from spg_jax.models.policy import Policy, Variables
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.process import cli
from spg_jax.rl import collection, evaluator
from spg_jax.rl.evaluator import Evaluator
from spg_jax.runs import plots, policies, preparation
from spg_jax.tasks.countdown import Countdown
from tests import compiling
from tests.meshes import mesh_of
from tests.published import save_checkpoint

PROBLEMS = [{'numbers': [3, 44, 7 + i], 'target': 26, 'index': i} for i in range(8)]


def get_config() -> ml_collections.ConfigDict:
    """Two updates; `prepare` makes the files that --config.base.checkpoint and
    --config.task.prompt_template are to name."""
    config = countdown.get_config('tiny')
    config.task.format = 'published_train'
    # One kernel of each layout: the masks of all seven are most of what compiling would cost.
    config.lora.update(rank=4, alpha=8.0, dropout=0.1, targets=('query', 'down'))
    config.sampling.update(prompt_length=40, length=6, steps=6, block_length=3)
    config.evaluation.update(lengths=(6,), steps=(6,), block_length=3, samples=1, batch=8)
    config.rl.update(prompts=2, group_size=4, microbatch=8)
    config.optimizer.learning_rate = 1e-2
    config.checkpoint.every = 1
    config.train.steps = 2
    return config


def prepare(root: Path) -> dict[str, str]:
    """Makes the base and a short wording, since time goes with length; returns the settings that
    name them."""
    save_checkpoint(root / 'published')
    (root / 'wording.txt').write_text('{numbers} {target}')
    return {
        'base.checkpoint': str(root / 'published'),
        'task.prompt_template': str(root / 'wording.txt'),
    }


def command(workdir: Path, settings: dict[str, str]) -> list[str]:
    """The module and arguments of one of several processes that train together."""
    return [
        'tests.adapted',
        '--distributed',
        f'--config={__file__}',
        f'--workdir={workdir}',
        *(f'--config.{name}={value}' for name, value in settings.items()),
    ]


def simplify(patch: pytest.MonkeyPatch) -> None:
    """The eight problems and their reward; the policy of the last update counts as the best,
    whatever it is worth. There is no pass@k, whose program would be compiled for it alone, and no
    picture of the curves, which tests/test_train.py has."""
    patch.setattr(Countdown, 'reward', lambda self, text, example: float(len(text) % 2))
    patch.setattr(Countdown, 'source', lambda self, split, folder: PROBLEMS)
    patch.setattr(Evaluator, 'validate', _later_is_better)
    patch.setattr(Evaluator, 'pass_at', lambda *_: 0.0)
    patch.setattr(plots, 'curves', lambda _: None)


def skip_evaluation(patch: pytest.MonkeyPatch) -> None:
    """No program for evaluation is compiled; the policy of the last update counts as the best."""
    figures = {'accuracy': 0.0, 'reward': 0.0, 'pass_at_1': 0.0, 'scorer': 'none'}
    patch.setattr(Evaluator, 'validate', _later_is_better)
    patch.setattr(Evaluator, 'report', lambda *_: figures)
    patch.setattr(Evaluator, 'trace', lambda *_: (np.zeros(1, int), np.zeros(1, int)))


def evaluate_without_the_model(patch: pytest.MonkeyPatch) -> None:
    """The completion of a prompt is its last tokens, because a sampler would be compiled in every
    process of a job. All else of an evaluation is as it is: each process has its rows, and they are
    put together."""

    def make_generate(_: Any, config: SamplingConfig) -> Any:
        def last_tokens(prompt: jax.Array) -> Completion:
            tokens = prompt[:, -config.length :]
            return Completion(tokens, jnp.zeros_like(tokens))

        program = jax.jit(last_tokens)
        return lambda variables, prompt, prompt_mask, keys: program(prompt)

    patch.setattr(evaluator, 'make_generate', make_generate)


def sample_without_the_model(patch: pytest.MonkeyPatch) -> None:
    """No sampler is compiled: the tokens of a rollout are random numbers of the keys, shifted by
    the adapters that sample if there are any, and are committed from left to right."""

    def make_generate(policy: Policy, config: SamplingConfig) -> Any:
        allowed = np.flatnonzero(policy.allowed)

        @jax.jit
        def generate(
            variables: Variables, prompt: jax.Array, prompt_mask: jax.Array, keys: jax.Array
        ) -> Completion:
            shift = sum(x.sum() for x in jax.tree.leaves(variables.get(COLLECTION, {})))
            numbers = jax.vmap(lambda key: jax.random.uniform(key, (config.length,)))(keys)
            place = jnp.int32((numbers + shift) % 1 * len(allowed)) % len(allowed)
            step = jnp.broadcast_to(jnp.arange(config.length), place.shape)
            return Completion(jnp.asarray(allowed, jnp.int32)[place], step)

        return generate

    patch.setattr(collection, 'make_generate', make_generate)


def share_programs(patch: pytest.MonkeyPatch, programs: dict[str, Any]) -> None:
    """Starts of one configuration on one mesh share the programs of the first of them, which each
    would trace and compile anew. That a start in a process of its own makes the same ones is in
    tests/test_train.py.

    Args:
      patch: where the makers of programs are replaced.
      programs: what they have made so far, by maker.
    """

    def once(name: str, make: Any) -> Any:
        def maker(*arguments: Any, **options: Any) -> Any:
            if name not in programs:
                programs[name] = make(*arguments, **options)
            return programs[name]

        return maker

    makers = ('make_update', 'make_arrival', 'make_diagnosis', 'make_keep', '_make_collect')
    for name in makers:
        patch.setattr(preparation, name, once(name, getattr(preparation, name)))


@partial(jax.jit, static_argnums=0)
def _apply(config: TransformerConfig, variables: Variables, tokens: jax.Array) -> jax.Array:
    return Transformer(config).apply(variables, tokens, tokens >= 0)


def logits(
    directory: Path, adapter: Path | None = None, adapted_as: Path | None = None
) -> np.ndarray:
    """What a policy on disk says about four rows of tokens, [4, 12, V].

    Policies with adapters share one program, and those without share another. A policy without gets
    adapters that are 0 and as large as those of the policy in `adapted_as`, whose program it then
    shares.
    """
    with jax.set_mesh(mesh_of()):
        policy, _, variables = policies.load_policy(directory, mesh_of(), adapter)
        if adapted_as:
            policy, _, others = policies.load_policy(adapted_as, mesh_of())
            zeros = jax.tree.map(
                lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
                others[COLLECTION],
            )
            variables = {'params': variables['params'], COLLECTION: zeros}
        tokens = np.random.default_rng(0).integers(5, 200, (4, 12)).astype(np.int32)
        return np.asarray(_apply(policy.config, variables, tokens))


def _later_is_better(*_: Any) -> dict[str, float]:
    return {'accuracy': time.time(), 'reward': 0.0}


if __name__ == '__main__':
    compiling.use_older_emitters_where_optimizations_are_off()
    if compiling.QUICKLY.items() <= os.environ.items():
        # A run would ignore this variable, since runs of users are to have the same numbers.
        del cli.NUMBERS[compiling.OPTIMIZATIONS_OFF]
    simplify(pytest.MonkeyPatch())
    evaluate_without_the_model(pytest.MonkeyPatch())
    runpy.run_module('spg_jax.train', run_name='__main__', alter_sys=True)
