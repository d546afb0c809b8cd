"""The programs of a conversion to diffusion: its update, and its loss on validation.

A comment such as `# [R, N]` after an assignment is the shape of the value, as in
`spg_jax.diffusion.block_denoising`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from spg_jax.data.sequences import Sequences
from spg_jax.diffusion.block_denoising import (
    Masks,
    draw_masks,
    embedding_noise,
    entropy_where_right,
    streams,
    weighted_loss,
)
from spg_jax.models.policy import Policy, Variables
from spg_jax.random import Purpose, example_keys, step_key
from spg_jax.training.train_state import Metrics, TrainState, apply_gradient

Update = Callable[[TrainState, Sequences], tuple[TrainState, Metrics]]
Loss = Callable[[Variables, Sequences], Array]


def logits_of(
    policy: Policy,
    variables: Variables,
    clean: Array,
    batch: Sequences,
    masks: Masks,
    block: int,
    noise: Array | None = None,
) -> Array:
    """Logits [R, N, V] at every position of the noisy sequences.

    Args:
      policy: a model without blocks of its own and without a shift of the logits.
      variables: its parameters.
      clean: [R, N] int32.
      batch: its rows are repeated where there are complements.
      masks: what is masked.
      block: tokens of a block; 0 for the whole length.
      noise: [R, N, D] on the embeddings of the noisy sequences, or None.
    """
    copies = len(clean) // len(batch.valid)
    valid = jnp.repeat(batch.valid, copies, axis=0)
    document = None if batch.document is None else jnp.repeat(batch.document, copies, axis=0)
    noisy = jnp.where(masks.masked, policy.mask_id, clean)
    tokens, visible = streams(noisy, clean, valid, document, block)
    if noise is not None and block:  # The clean copy has no noise.
        noise = jnp.concatenate([noise, jnp.zeros_like(noise)], axis=1)
    hidden = policy.hidden(variables, tokens, visible, noise=noise)
    return policy.unembed(variables, hidden[:, : clean.shape[1]])


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    block: int,
    shardings: TrainState,
    *,
    seed: int,
    complementary: bool,
    cap: float,
    noise: float,
    noise_updates: int,
) -> Update:
    """A compiled (state, sequences) -> (state, metrics); the old state is given up.

    Args:
      policy: the model.
      optimizer: how its parameters change.
      block: tokens of a block; 0 for the whole length.
      shardings: of the state, which the new state keeps.
      seed: of masks and noise.
      complementary: whether each sequence also comes with its other tokens masked.
      cap: weight of the entropy of right predictions.
      noise: standard deviation of the noise on embeddings of MASK.
      noise_updates: updates since the start of the conversion that have this noise.
    """

    def loss_of(trained: Variables, batch: Sequences, step: Array) -> tuple[Array, Metrics]:
        row_keys = example_keys(seed, Purpose.CORRUPT, step, batch.index)
        key = step_key(seed, Purpose.CORRUPT, step)
        masks = draw_masks(key, row_keys, batch.maskable, complementary)
        clean = jnp.repeat(batch.tokens, 2 if complementary else 1, axis=0)
        on_masked = None
        if noise and noise_updates:
            scale = jnp.where(step < noise_updates, noise, 0.0)
            keys = example_keys(seed, Purpose.NOISE, step, batch.index)
            on_masked = embedding_noise(keys, masks.masked, policy.config.width, scale)
        logits = logits_of(policy, trained, clean, batch, masks, block, on_masked)
        loss = weighted_loss(logits, clean, masks)
        metrics = {'loss': (loss, jnp.float32(1))}
        if not cap:
            return loss, metrics
        entropy = entropy_where_right(logits, clean, masks.masked)
        return loss + cap * entropy, metrics | {'entropy_where_right': (entropy, jnp.float32(1))}

    def step(state: TrainState, batch: Sequences) -> tuple[TrainState, Metrics]:
        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.trained, batch, state.step
        )
        state, more = apply_gradient(state, gradient, loss, optimizer)
        return state, metrics | more

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_validation(policy: Policy, block: int, seed: int) -> Loss:
    """A compiled (variables, sequences) -> loss in nats per token, always with the same masks."""

    @jax.jit
    def loss(variables: Variables, batch: Sequences) -> Array:
        row_keys = example_keys(seed, Purpose.EVALUATE, 0, batch.index)
        key = step_key(seed, Purpose.EVALUATE, 0)
        masks = draw_masks(key, row_keys, batch.maskable, complementary=False)
        logits = logits_of(policy, variables, batch.tokens, batch, masks, block)
        return weighted_loss(logits, batch.tokens, masks)

    return loss
