"""One step of a block: what each position would get, and which of them are committed.

A comment such as `# [B, b, V]` after an assignment is the shape of the value: `B` sequences, `b`
positions of a block, `V` vocabulary; `[]` is a scalar.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spg_jax.diffusion import token_law
from spg_jax.diffusion.samplers import rules
from spg_jax.diffusion.samplers.settings import SamplingConfig


def predict(
    logits: Array,
    is_masked: Array,
    keys: Array,
    step: Array,
    turn: Array,
    allowed: Array,
    config: SamplingConfig,
    names: tuple[str, ...],
) -> tuple[Array, Array, dict[str, Array], rules.View]:
    """Predicts a token for each position of the block, and chooses the positions to commit.

    Args:
      logits: [B, b, V] float32.
      is_masked: [B, b] bool, the positions that may be committed.
      keys: [B] keys of the rows.
      step: [] or [B] int32, counted over the completion.
      turn: [] int32, the step of the block.
      allowed: [V] bool.
      config: how to decode.
      names: what is recorded.

    Returns:
      token [B, b] int32, commit [B, b] bool, records by name, and the view of each row.
    """
    view, drawable = draw(logits, is_masked, keys, step, allowed, config)
    view = view.replace(
        count=_due(is_masked.sum(-1), turn, config),
        scheduled=jnp.broadcast_to(scheduled_commits(config)[turn], keys.shape),
    )
    commit = jax.vmap(lambda view: rules.commitment(config.rule, view, config))(view)
    records = token_law.record(names, drawable, view.token, config.temperature)
    if 'confidence' in names:
        records['confidence'] = jnp.exp(jax.vmap(lambda view: view.log_confidence)(view))
    return view.token, commit, records, view


def draw(
    logits: Array,
    is_masked: Array,
    keys: Array,
    step: Array,
    allowed: Array,
    config: SamplingConfig,
) -> tuple[rules.View, Array]:
    """Draws a token for each position of a block; the arguments are those of `predict`.

    Returns:
      the view of each row, with nothing due, and the logits [B, b, V] of the law drawn from, -inf
      for ids that it leaves out.
    """
    step_axis = 0 if step.ndim else None

    def key_of(purpose: int) -> Array:
        """Keys [B], which depend on the key of the row, the step and the purpose."""
        fold = lambda key, step: jax.random.fold_in(key, 2 * step + purpose)  # noqa: E731
        return jax.vmap(fold, (0, step_axis))(keys, step)

    # Where the model gives -inf to all allowed ids, the finite floor keeps them ahead of the ids
    # that are not allowed.
    floored = jnp.maximum(logits, jnp.finfo(logits.dtype).min)  # [B, b, V]
    choosable = jnp.where(allowed[None, None, :], floored, -jnp.inf)  # [B, b, V]
    noisy = drawable = choosable
    if config.temperature > 0.0:
        if config.top_k or config.top_p < 1.0:
            kept = token_law.kept_ids(choosable, config.temperature, config.top_k, config.top_p)
            drawable = jnp.where(kept, choosable, -jnp.inf)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(key_of(0))
        noisy = drawable + config.temperature * noise
    token = token_law.likeliest(noisy)  # [B, b]
    nothing = jnp.zeros(keys.shape, jnp.int32)
    view = rules.View(
        logits=logits,
        choosable=choosable,
        token=token,
        masked=is_masked,
        count=nothing,
        scheduled=nothing,
        key=key_of(1),
    )
    return view, drawable


def _due(masked: Array, turn: Array, config: SamplingConfig) -> Array:
    """How many of the masked tokens [B] of each row a step of a block commits at least."""
    if config.schedule == 'timesteps':
        is_last = turn + 1 >= config.steps_per_block  # which also commits what was taken back
        return jnp.where(is_last, masked, jnp.minimum(masked, scheduled_commits(config)[turn]))
    # What is left is spread evenly, and the first steps of an uneven block commit one more.
    left = config.steps_per_block - turn
    if config.edits_in_blocks:  # None of the rounds after the last step has a mask left.
        left = jnp.maximum(left, 1)
    return -(-masked // left)


def scheduled_commits(config: SamplingConfig) -> Array:
    """How many tokens each step of a block commits if no rule commits more, [steps_per_block].

    Where the block does not divide evenly, the first steps of an even schedule commit one token
    more.
    """
    if config.schedule == 'timesteps':
        return jnp.asarray(timestep_commits(config.block_length, config.steps_per_block))
    share, remainder = divmod(config.block_length, config.steps_per_block)
    return share + (jnp.arange(config.steps_per_block) < remainder)


def timestep_commits(masked: int, steps: int) -> np.ndarray:
    """How many of the masked tokens each step commits in Dream's schedule, [steps] int32.

    A step from time t to s commits the share 1 - s/t of the tokens that are masked, rounded down,
    and the last step all. The published times end at 1e-3, in float32, which rounds down once more:
    12 tokens in 6 steps give 1, 2, 2, 2, 2, 3.
    """
    times = np.linspace(1, 1e-3, steps + 1, dtype=np.float32)
    commits = []
    for step in range(steps):
        share = np.float32(1) - times[step + 1] / times[step]
        commits.append(masked if step == steps - 1 else int(np.float32(masked) * share))
        masked -= commits[-1]
    return np.array(commits, np.int32)
