"""The rivals' losses and gradients, by their released or ported code, on the tiny LLaDA.

`tests/reference/objectives.npz` hands over corrupted inputs, advantages and other policies'
log-probabilities; these helpers put them into our learner and compare what comes out.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.testing import assert_allclose

from spg_jax.diffusion.corruption import Corruption, Draws
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.models.policy import Policy
from spg_jax.models.weights import load_checkpoint
from spg_jax.rl.batching import Batching
from spg_jax.rl.objectives import REGISTRY, Batch, Objective, Protocol
from spg_jax.rl.objectives.objective import Readout, token_log_probs
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import Reader, corrupt, moments

REFERENCE = Path(__file__).parents[2] / 'reference'
MASK, EOS = 250, 1


@functools.cache
def published() -> dict[str, np.ndarray]:
    """The arrays of objectives.npz by their names."""
    with np.load(REFERENCE / 'objectives.npz') as file:
        return {name: file[name] for name in file.files}


@functools.cache
def tiny_llada() -> tuple[Policy, dict[str, Any]]:
    """The policy and its parameters."""
    model, _, params = load_checkpoint(REFERENCE / 'tiny_llada')
    return Policy(model, MASK, EOS, np.ones(model.vocab_size, bool)), {'params': params}


def objective_of(
    name: str,
    group_size: int | None = None,
    sampling: SamplingConfig | None = None,
    rows: int = 6,
    **settings: Any,
) -> Objective:
    """An objective with its published settings, some of them changed, for the published rows.

    Args:
      name: a name of the registry.
      group_size: G; by default all rows are one group.
      sampling: of rollouts; by default two tokens a step in blocks of 8.
      rows: B.
      settings: fields of its `Settings`.
    """
    method, length = REGISTRY[name], published()['completion'].shape[1]
    batching = Batching(
        compact=False,
        prompts=rows // (group_size or rows),
        group_size=group_size or rows,
        inner_updates=2,
        generation_batch=0,
        microbatch=rows,
        draws_per_pass=0,
    )
    protocol = Protocol(
        corruption=Corruption(kind='block', draws=2, block_length=8),
        sampling=sampling or SamplingConfig(length, length // 2, 8, temperature=1.0),
        batching=batching,
    )
    return method.build(method.settings(**settings), protocol)


def published_rollout(advantage: Any = None, reward: Any = None, **extras: Any) -> Rollout:
    """The published rows as a rollout; `advantage` is by default the published one.

    Its arrays, and those of draws, are NumPy's: JAX would compile a program for each operation on
    each shape.
    """
    arrays = published()
    completion, prompt = arrays['completion'], arrays['prompt']
    rows, is_eos = len(completion), completion == EOS
    advantage = arrays['advantages'] if advantage is None else advantage
    return Rollout(
        prompt=prompt,
        prompt_mask=np.ones(prompt.shape, bool),
        completion=completion,
        scored=np.cumsum(is_eos, axis=1) - is_eos == 0,  # the tokens before the EOS, and the EOS
        commit_step=arrays['commit_step'],
        reward=np.zeros(rows, np.float32) if reward is None else np.asarray(reward),
        advantage=np.asarray(advantage, np.float32),
        example_id=np.arange(rows, dtype=np.uint32),
        extras={name: np.asarray(value) for name, value in extras.items()},
    )


def draws_from(masked: np.ndarray, **fields: Any) -> Draws:
    """Draws with the masks [B, M, L], or [B, M, C] of completions after clean prompts."""
    masked = np.asarray(masked)
    prompt = published()['prompt'].shape[1]
    if masked.shape[-1] == published()['completion'].shape[1]:
        clean = np.zeros((*masked.shape[:2], prompt), bool)
        masked = np.concatenate([clean, masked], axis=2)
    fields = {name: np.asarray(value) for name, value in fields.items()}
    return Draws(masked=masked, **fields)


def draws_over_updates(
    objective: Objective, rollout: Rollout, updates: int, inner_updates: int = 1
) -> Draws:
    """The draws [updates, B, M, ...] of consecutive updates from the first one of a run."""

    def draw(step: jax.Array) -> Draws:
        return corrupt(
            objective.corruption, rollout, moments(0, rollout, step, step % inner_updates)
        )

    return jax.device_get(jax.jit(jax.vmap(draw))(np.arange(updates, dtype=np.int32)))


def advantage_of(objective: Objective, reward: Any, group_size: int) -> np.ndarray:
    """The advantages [B] of rewards [B], by one program."""
    reward = np.asarray(reward, np.float32)
    return np.asarray(jax.jit(objective.advantage, static_argnums=1)(reward, group_size))


def loss_of(
    objective: Objective,
    readouts: Any,
    rollout: Rollout,
    draws: Draws,
    rows: slice = slice(None),
    **others: Any,
) -> tuple[float, float]:
    """(loss, weight) of some rows of a batch, from readouts [B, M, C] alone."""
    batch = Batch(rollout, draws, others, step=None)
    batch = jax.tree.map(lambda x: np.asarray(x)[rows], batch).replace(step=np.int32(0))
    loss = jax.jit(objective.loss)(np.asarray(readouts)[rows], batch)
    return float(loss.total / loss.weight), float(loss.weight)


@functools.cache
def _programs(readout: Readout, teacher: bool) -> tuple[Any, Any]:
    """(readouts [B, 1, C] of one draw, their product with weights pulled back to the parameters).

    One draw at a time and with every field of the draws, so that all methods share two programs.
    """
    policy, _ = tiny_llada()
    reader = Reader(policy, readout, 'teacher' if teacher else '')
    step = jnp.int32(0)

    def read(variables: Any, rollout: Rollout, draws: Draws, other: Any) -> jax.Array:
        return reader(variables, rollout, draws, step, None, {'teacher': other})

    def pull_back(
        variables: Any, rollout: Rollout, draws: Draws, other: Any, weights: jax.Array
    ) -> Any:
        return jax.grad(lambda v: optax.tree.vdot(weights, read(v, rollout, draws, other)))(
            variables
        )

    return jax.jit(read), jax.jit(pull_back)


def gradient_of(
    objective: Objective, rollout: Rollout, draws: Draws, teacher: Any = None, **others: Any
) -> tuple[Any, Any, Any]:
    """(loss, gradient, metrics) at the published weights, by the chain rule of the learner.

    Args:
      objective: its loss is differentiated. The policies that it looks at are not read out.
      teacher: the parameters of the policy whose logits the readout sees.
      others: their readouts [B, M, C], such as `behaviour=` and `reference=`.
    """
    _, variables = tiny_llada()
    read, pull_back = _programs(objective.readout, bool(objective.teacher))
    # Extras of the rollout, which this readout does not look at, would make other programs.
    plain = objective.readout is token_log_probs
    seen = rollout.replace(extras={}) if plain else rollout
    # NumPy cuts and adds: JAX would compile a program for each operation and shape.
    prompt, completion, masked = map(np.asarray, (rollout.prompt, rollout.completion, draws.masked))
    tokens = np.concatenate([prompt, completion], axis=1)
    number = masked.shape[1]
    whole = Draws(
        masked=masked,
        tokens=_or(draws.tokens, np.repeat(tokens[:, None], number, 1)),
        label=_or(draws.label, np.repeat(completion[:, None], number, 1)),
        valid=_or(draws.valid, np.ones(masked.shape, bool)),
    )
    each = [jax.tree.map(lambda x, k=k: np.asarray(x)[:, k : k + 1], whole) for k in range(number)]
    readouts = jax.tree.map(
        lambda *x: np.concatenate(x, axis=1),
        *[read(variables, seen, draw, teacher) for draw in each],
    )
    others = {name: np.asarray(value, np.float32) for name, value in others.items()}

    @jax.jit
    def weights_of(readouts: jax.Array, batch: Batch) -> Any:
        def total(readouts: jax.Array) -> Any:
            loss = objective.loss(readouts, batch)
            return loss.total, loss

        return jax.grad(total, has_aux=True)(readouts)

    batch = Batch(rollout, draws, others, np.int32(0))
    weights, loss = jax.device_get(weights_of(readouts, batch))
    parts = []
    for k, draw in enumerate(each):
        part = jax.tree.map(lambda x, k=k: x[:, k : k + 1], weights)
        parts.append(pull_back(variables, seen, draw, teacher, part))
    weight = max(float(loss.weight), 1.0)
    gradient = jax.tree.map(lambda *x: sum(map(np.asarray, x)) / np.float32(weight), *parts)
    return loss.total / weight, gradient, loss.metrics


def _or(field: Any, default: Any) -> Any:
    return default if field is None else field


def assert_published(
    case: str, objective: Objective, rollout: Rollout, draws: Draws, **arguments: Any
) -> Any:
    """Compares loss and gradient with those of a published case; returns our metrics.

    Args:
      case: the start of the keys `…/loss`, `…/grad_norm` and `…/grad_q_proj0`.
      objective, rollout, draws, arguments: as in `gradient_of`.
    """
    arrays = published()
    loss, gradient, metrics = gradient_of(objective, rollout, draws, **arguments)
    assert_allclose(loss, arrays[f'{case}/loss'], rtol=1e-4, atol=1e-6)
    expected = arrays[f'{case}/grad_q_proj0'].T
    found = gradient['params']['layers']['query']['kernel'][0]
    assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    norm = arrays[f'{case}/grad_norm']
    total = sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(gradient))
    assert_allclose(np.sqrt(total), norm, rtol=1e-4, atol=1e-7)
    return metrics
