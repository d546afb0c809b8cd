"""The learner: one gradient step of an objective on a rollout, in microbatches and passes of draws.

A loss depends on the policy only through the log-probabilities logp [b, M, C]. Its gradient is
therefore the product of d loss / d logp, which is cheap, and the Jacobian of logp. This product can
be computed a few draws at a time. A first pass computes all log-probabilities without a gradient,
and from them d loss / d logp. Then each pass differentiates the log-probabilities of its draws,
weighted by their part of d loss / d logp, which stays fixed. Memory then does not grow with M, at
the price of one more forward pass. The gradient is the same, although the EUBO couples the draws
through its logarithm.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from spg_jax.diffusion.bounds import completion_log_probs
from spg_jax.diffusion.corruption import apply_masks
from spg_jax.models.policy import Policy, Variables
from spg_jax.random import Purpose, example_keys
from spg_jax.rl.batching import Batching
from spg_jax.rl.objectives import Batch, Objective
from spg_jax.rl.rollout import Rollout, rollout_metrics
from spg_jax.training.train_state import Metrics, TrainState, apply_gradient

Corrupted = tuple[Array, Array | None]  # masked [b, M, L] bool, keys of dropout [b, M]


def make_update(
    policy: Policy,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batching: Batching,
    seed: int,
    shardings: TrainState,
) -> Callable[[TrainState, Rollout], tuple[TrainState, Metrics]]:
    """A compiled (state, rollout) -> (state, metrics), which reuses the memory of the old state.

    Every update corrupts the rows afresh, with keys made from seed, step and identity of the row.

    Args:
      policy: the model.
      objective: the corruption and the loss.
      optimizer: how a gradient changes the parameters.
      batching: how the rows are cut into pieces.
      seed: the root of the run's random numbers.
      shardings: `shardings_of` the state, which the new state keeps.
    """
    gradient_of = make_gradient(
        policy, objective, microbatch=batching.microbatch, draws_per_pass=batching.draws_per_pass
    )
    lora = policy.config.lora

    def dropout_keys(step: Array, rollout: Rollout) -> Array | None:
        if lora is None or not lora.dropout:
            return None
        keys = example_keys(seed, Purpose.DROPOUT, step, rollout.example_id)
        return jax.vmap(lambda key: jax.random.split(key, objective.corruption.draws))(keys)

    def update(state: TrainState, rollout: Rollout) -> tuple[TrainState, Metrics]:
        keys = example_keys(seed, Purpose.CORRUPT, state.step, rollout.example_id)
        draws = jax.vmap(objective.corruption)(keys, rollout.prompt_mask, rollout.scored)
        loss, gradient, metrics = gradient_of(
            state.trained, state.frozen, rollout, draws, dropout_keys(state.step, rollout)
        )
        state, applied = apply_gradient(state, gradient, loss, optimizer)
        metrics |= applied | rollout_metrics(rollout, batching.group_size, policy.eos_id)
        return state, metrics | {'loss': (loss, jnp.float32(1))}

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def make_gradient(
    policy: Policy, objective: Objective, *, microbatch: int, draws_per_pass: int
) -> Callable[..., tuple[Array, Variables, Metrics]]:
    """A function (trained, frozen, rollout, draws, dropout) -> (loss, gradient, metrics) over the
    whole batch.

    Args:
      policy: the model.
      objective: its loss is differentiated; its corruption made `draws`, [B, M, L] and [B, M].
      microbatch: rows that are differentiated at once; it divides B.
      draws_per_pass: draws that are differentiated at once; it divides M, and 0 stands for all.

    The function differentiates by `trained` only. `frozen` holds the policy's other collections,
    and `dropout` holds the keys [B, M] of the adapters' dropout, or is None.
    """

    def of_microbatch(
        trained: Variables, frozen: Variables, rows: tuple[Rollout, Any, Array | None]
    ) -> tuple[Variables, Any]:
        rollout, draws, dropout = rows
        batch = Batch(
            completion=rollout.completion,
            scored=rollout.scored,
            masked=draws.masked[:, :, rollout.prompt.shape[1] :],
            block=draws.block,
            advantage=rollout.advantage,
        )

        def log_probs(trained: Variables, corrupted: Corrupted) -> Array:
            return draw_log_probs(policy, frozen | trained, rollout, *corrupted)

        def loss_of(logp: Array) -> tuple[Array, Any]:
            loss = objective.loss(logp, batch)
            return loss.total, loss

        weights_of = jax.grad(loss_of, has_aux=True)  # logp -> (d loss / d logp, Loss)
        corrupted = draws.masked, dropout
        passes = draws.masked.shape[1] // draws_per_pass if draws_per_pass else 1
        if passes == 1:
            logp, pull_back = jax.vjp(lambda trained: log_probs(trained, corrupted), trained)
            weights, loss = weights_of(logp)
            return pull_back(weights)[0], loss
        corrupted = jax.tree.map(lambda x: _split(x, passes), corrupted)
        return _in_passes(log_probs, weights_of, trained, corrupted)

    def gradient_of(
        trained: Variables,
        frozen: Variables,
        rollout: Rollout,
        draws: Any,
        dropout: Array | None = None,
    ) -> tuple[Array, Variables, Metrics]:
        batches = len(rollout.reward) // microbatch
        rows = jax.tree.map(lambda x: _microbatches(x, batches), (rollout, draws, dropout))

        def add(gradient: Variables, rows: Any) -> tuple[Variables, Any]:
            addend, loss = of_microbatch(trained, frozen, rows)
            return jax.tree.map(jnp.add, gradient, addend), loss

        gradient, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), rows)
        losses = jax.tree.map(lambda x: x.sum(0), losses)
        weight = jnp.maximum(losses.weight, 1.0)
        return losses.total / weight, jax.tree.map(lambda g: g / weight, gradient), losses.metrics

    return gradient_of


def _in_passes(
    log_probs: Callable[[Variables, Corrupted], Array],
    weights_of: Callable[[Array], tuple[Array, Any]],
    trained: Variables,
    corrupted: Corrupted,
) -> tuple[Variables, Any]:
    """The gradient of a loss, computed in passes over the draws, and the loss.

    Args:
      log_probs: (trained, (masked [b, m, L], keys [b, m])) -> logp [b, m, C] of m draws.
      weights_of: logp [b, M, C] of all draws -> (d loss / d logp, loss).
      trained: the parameters at which the gradient is taken.
      corrupted: masks and keys of all draws, with a leading axis of passes.
    """
    logp = jax.lax.map(lambda corrupted: log_probs(trained, corrupted), corrupted)
    weights, loss = weights_of(_join(logp))

    def add(gradient: Variables, draws: tuple[Corrupted, Array]) -> tuple[Variables, None]:
        corrupted, weights = draws
        addend = jax.grad(lambda trained: jnp.vdot(weights, log_probs(trained, corrupted)))(trained)
        return jax.tree.map(jnp.add, gradient, addend), None

    zero = jax.tree.map(jnp.zeros_like, trained)
    return jax.lax.scan(add, zero, (corrupted, _split(weights, len(logp))))[0], loss


def draw_log_probs(
    policy: Policy,
    variables: Variables,
    rollout: Rollout,
    masked: Array,
    dropout: Array | None = None,
) -> Array:
    """Log-probability of every completion token under each draw.

    Args:
      policy: the model.
      variables: its collections of parameters.
      rollout: b rows.
      masked: [b, m, L] bool, True where MASK replaces the token.
      dropout: [b, m] keys of the adapters' dropout, or None.

    Returns:
      [b, m, C] float32, in nats. Logits are computed for b x m x C positions only.
    """
    rows, draws, _ = masked.shape
    prompt_length = rollout.prompt.shape[1]
    tokens = jnp.concatenate([rollout.prompt, rollout.completion], axis=1)
    noisy = jax.vmap(apply_masks, (0, 0, None))(tokens, masked, policy.mask_id)
    noisy = noisy.reshape(rows * draws, -1)
    logits = policy.completion_logits(
        variables,
        noisy[:, :prompt_length],
        jnp.repeat(rollout.prompt_mask, draws, axis=0),
        noisy[:, prompt_length:],
        None if dropout is None else dropout.reshape(-1),
    )
    logits = logits.reshape(rows, draws, *logits.shape[1:])
    return jax.vmap(completion_log_probs)(logits, rollout.completion)


def _microbatches(x: Array, batches: int) -> Array:
    """[B, ...] -> [batches, B / batches, ...]; the stride keeps rows on their devices."""
    return jnp.moveaxis(x.reshape(len(x) // batches, batches, *x.shape[1:]), 1, 0)


def _split(x: Array, passes: int) -> Array:
    """[b, M, ...] -> [passes, b, M / passes, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], passes, -1, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """[passes, b, m, ...] -> [b, passes * m, ...]: the inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
