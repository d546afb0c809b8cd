"""The step of training on demonstrations: masked diffusion, or else the next token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from spg_jax.data.demonstrations import Demonstrations
from spg_jax.diffusion.denoising import (
    correction_loss,
    denoising_loss,
    keeping_loss,
    next_token_loss,
    random_tokens,
    stratified_masks,
)
from spg_jax.models.policy import Policy, Variables
from spg_jax.random import Purpose, example_keys, step_key
from spg_jax.training.train_state import Metrics, TrainState, apply_gradient


def make_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    seed: int,
    ema: float,
    shardings: TrainState,
    edit_weight: float = 0.0,
    random_rate: float = 0.0,
    keep_weight: float = 0.0,
) -> Callable[[TrainState, Demonstrations], tuple[TrainState, Metrics]]:
    """A compiled (state, demonstrations) -> (state, metrics); the old state is given up.

    Args:
      policy: the model; an autoregressive one learns to predict the next token.
      optimizer: how its trained parameters change.
      seed: of the masks, and of the adapters' dropout.
      ema: decay of the averaged parameters.
      shardings: of the state, which the new state keeps.
      edit_weight: of the loss on answers to correct, which the demonstrations then have; 0: none.
      random_rate: the largest share of random tokens among those of an answer to correct.
      keep_weight: of the loss on tokens that are not masked; 0: none.
    """

    lora = policy.config.lora

    def logits_of(
        variables: Variables, batch: Demonstrations, completion: Array, step: Array
    ) -> Array:
        """Logits [B, C, V] at the positions of a completion [B, C]."""
        dropout = None
        if lora and lora.dropout:
            dropout = example_keys(seed, Purpose.DROPOUT, step, batch.index)
        prompt, mask = batch.prompt, batch.prompt_mask
        return policy.completion_logits(variables, prompt, mask, completion, dropout)

    def autoregressive_loss(
        trained: Variables, frozen: Variables, batch: Demonstrations, step: Array
    ) -> tuple[Array, Metrics]:
        logits = logits_of(frozen | trained, batch, batch.completion, step)
        return next_token_loss(logits, batch.completion), {}

    def diffusion_loss(
        trained: Variables, frozen: Variables, batch: Demonstrations, step: Array
    ) -> tuple[Array, Metrics]:
        row_keys = example_keys(seed, Purpose.CORRUPT, step, batch.index)
        masked = stratified_masks(
            step_key(seed, Purpose.CORRUPT, step), row_keys, batch.completion.shape[1]
        )
        noisy = jnp.where(masked, policy.mask_id, batch.completion)
        logits = logits_of(frozen | trained, batch, noisy, step)
        loss = of_masked = denoising_loss(logits, batch.completion, masked)
        losses = {}
        if keep_weight:
            losses['keep_loss'] = keeping_loss(logits, batch.completion, masked)
            loss += keep_weight * losses['keep_loss']
        if edit_weight:
            keys = example_keys(seed, Purpose.EDIT, step, batch.index)
            wrong = random_tokens(keys, batch.corrections.wrong, policy.allowed, random_rate)
            logits = logits_of(frozen | trained, batch, wrong, step)
            losses['edit_loss'] = correction_loss(logits, batch.corrections.right)
            loss += edit_weight * losses['edit_loss']
        if losses:
            losses['denoising_loss'] = of_masked
        return loss, {name: (value, jnp.float32(1)) for name, value in losses.items()}

    loss_of = autoregressive_loss if policy.config.autoregressive else diffusion_loss

    def step(state: TrainState, batch: Demonstrations) -> tuple[TrainState, Metrics]:
        (loss, losses), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.trained, state.frozen, batch, state.step
        )
        state, metrics = apply_gradient(state, gradient, loss, optimizer)
        # A young average follows its parameters closely, or it would remember the initial ones.
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        average = optax.incremental_update(state.average, state.trained, decay)
        metrics |= losses | {'loss': (loss, jnp.float32(1))}
        return state.replace(average=average), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
