"""What the tests of objectives with scores of sequences are made of."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.objectives import Batch, Objective
from spg_jax.rl.rollout import Rollout
from tests.rl.objectives.published import draws_over_updates, published_rollout


def readouts_with(scores: Any, draws: Draws, target: Any) -> np.ndarray:
    """Readouts [B, M, C] of a policy whose scores are these.

    Args:
      scores: [B, K], the sums over M / K neighbouring draws of w_k sum_{i in target_k} l_{k,i}.
      draws: with weights [B, M].
      target: [B, M, C] bool; at least one draw of each sum has a position.
    """
    target, weight = np.asarray(target), np.asarray(draws.weight, np.float64)
    size = target.sum(-1)  # [B, M]
    parts = np.asarray(scores).shape[1]
    nonempty = (size > 0).reshape(len(size), parts, -1)
    shares = nonempty / nonempty.sum(-1, keepdims=True) * np.asarray(scores)[..., None]
    per_token = shares.reshape(size.shape) / (weight * np.maximum(size, 1))
    return np.where(target, per_token[..., None], 0.0).astype(np.float32)


def hand_batch(
    masked: Any, advantage: Any = None, scored: Any = None, reward: Any = None, **others: Any
) -> Batch:
    """A batch of a few short completions after clean prompts; `others` are readouts [B, M, C].

    Args:
      masked: [B, M, C].
      advantage: [B].
      scored: [B, C]; by default all positions.
      reward: [B].
    """
    masked = np.asarray(masked, bool)
    rows, number, length = masked.shape
    rollout = jax.tree.map(lambda x: np.asarray(x)[:rows], published_rollout()).replace(
        completion=np.full((rows, length), 5),
        scored=np.ones((rows, length), bool) if scored is None else np.asarray(scored, bool),
        advantage=np.asarray(np.zeros(rows) if advantage is None else advantage, np.float32),
        reward=np.asarray(np.zeros(rows) if reward is None else reward, np.float32),
    )
    clean = np.zeros((rows, number, rollout.prompt.shape[1]), bool)
    draws = Draws(masked=np.concatenate([clean, masked], 2))
    others = {name: np.asarray(value, np.float32) for name, value in others.items()}
    return Batch(rollout, draws, others, np.int32(0))


def with_draws(batch: Batch, **fields: Any) -> Batch:
    """The batch with fields of its draws replaced."""
    fields = {name: np.asarray(value) for name, value in fields.items()}
    fields = {
        name: value.astype(np.float32) if name == 'weight' else value
        for name, value in fields.items()
    }
    return batch.replace(draws=batch.draws.replace(**fields))


def value_and_gradient(objective: Objective, logp: Any, batch: Batch) -> tuple[Any, Any]:
    """(loss, its gradient with respect to the readouts [B, M, C])."""
    return _compiled(objective.loss)(np.asarray(logp, np.float32), batch)


@functools.cache
def _compiled(loss_of: Any) -> Any:
    def value(logp: Any, batch: Batch) -> Any:
        loss = loss_of(logp, batch)
        return loss.total / jnp.maximum(loss.weight, 1.0)

    return jax.jit(jax.value_and_grad(value))


def many_draws(objective: Objective, rollout: Rollout, steps: int, turns: int = 1) -> Draws:
    """The draws [steps, B, M, ...] of the updates of a run, `turns` on each rollout, in NumPy."""
    return jax.tree.map(np.asarray, draws_over_updates(objective, rollout, steps, turns))


def ends(rollout: Rollout) -> np.ndarray:
    """[B, L] bool, False after the EOS; the prompts are without padding."""
    return np.concatenate([np.ones(rollout.prompt.shape, bool), rollout.scored], axis=1)


def part(batch: Batch, rows: Any) -> Batch:
    """The batch with these rows only."""
    arrays = {'rows': batch.rows, 'draws': batch.draws, 'others': batch.others}
    return batch.replace(**jax.tree.map(lambda x: x[rows], arrays))


def assert_mean_over_groups(objective: Objective, logp: Any, batch: Batch) -> None:
    """The loss of two groups is the mean of the losses of each, for `objective` of that size."""
    half = len(logp) // 2
    both, _ = value_and_gradient(objective, logp, batch)
    alone = [
        value_and_gradient(objective, logp[rows], part(batch, rows))[0]
        for rows in (slice(0, half), slice(half, None))
    ]
    assert abs(alone[0] - alone[1]) > 1e-3
    assert_allclose(both, np.mean(alone), rtol=1e-5)
