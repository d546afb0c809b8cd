"""The one place where policies are read out under draws; learner and rollout both use it.

Shapes: `b` rows, `m` draws, `P` tokens of a prompt, `C` positions of a completion, `L` = P + C, `V`
vocabulary.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.bounds import completion_log_probs
from spg_jax.diffusion.corruption import Draws, apply_masks
from spg_jax.models.lora import COLLECTION
from spg_jax.models.policy import Policy, Variables
from spg_jax.random import Purpose, example_keys, step_key
from spg_jax.rl.objectives.objective import Corrupt, Moment, Readout, View, token_log_probs
from spg_jax.rl.rollout import Rollout
from spg_jax.sharding import current_row_shards, current_shards

# The bytes of float32 logits that a device holds at once for `token_log_probs`. Below it cuts save
# nothing that matters, and take time (docs/performance.md).
LARGEST_LOGITS = 2**26
BIRTH = 'birth'  # of a row of a ring: the update before which it was sampled; part of its identity


def moments(
    seed: int, rows: Rollout, step: Array, turn: Array, purpose: Purpose = Purpose.CORRUPT
) -> Moment:
    """When and where each row of a batch is corrupted: keys [b] and [], turn [], rank [b].

    Args:
      seed: the root of the run's random numbers.
      rows: the batch of an update.
      step: [] int32, updates done.
      turn: [] int32, updates since the rollout arrived.
      purpose: what the draws are for.
    """

    def row_keys(step: Array) -> Array:
        keys = example_keys(seed, purpose, step, rows.example_id)
        if BIRTH in rows.extras:
            keys = jax.vmap(jax.random.fold_in)(keys, rows.extras[BIRTH])
        return keys

    def shared_key(step: Array) -> Array:
        return jax.random.fold_in(step_key(seed, Purpose.SHARED, step), purpose)

    return Moment(
        row=row_keys(step),
        shared=shared_key(step),
        row_at_rollout=row_keys(step - turn),
        shared_at_rollout=shared_key(step - turn),
        turn=turn,
        rank=jnp.arange(len(rows.reward), dtype=jnp.int32),
    )


def corrupt(corruption: Corrupt, rows: Rollout, moment: Moment) -> Draws:
    """The draws [b, M, ...] of a batch."""
    axes = Moment(row=0, shared=None, row_at_rollout=0, shared_at_rollout=None, turn=None, rank=0)
    return jax.vmap(corruption, (0, axes))(rows, moment)


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Reads policies out under draws.

    Attributes:
      policy: the model of the trained policy.
      readout: what is read out of logits.
      teacher: the policy whose logits the readout sees; '' for none.
    """

    policy: Policy
    readout: Readout = token_log_probs
    teacher: str = ''

    def __call__(
        self,
        variables: Variables,
        rows: Rollout,
        draws: Draws,
        step: Array,
        dropout: Array | None = None,
        others: Mapping[str, Variables] | None = None,
    ) -> Array:
        """Readouts [b, m, C] float32, of logits at b x m x C positions only.

        Args:
          variables: the parameters of the policy that is read out. Without adapters among them it
            is the model that the adapters change.
          rows: b rows.
          draws: [b, m, ...].
          step: [] int32, updates done.
          dropout: [b, m] keys of the adapters' dropout, or None.
          others: the parameters of other policies, for the teacher.
        """
        if self.readout is token_log_probs and self._pieces(rows, draws) > 1:
            return self._log_probs(variables, rows, draws, dropout)
        teacher = None
        if self.teacher:
            teacher = jax.lax.stop_gradient(
                self._logits((others or {})[self.teacher], rows, draws, None)
            )
        logits = self._logits(variables, rows, draws, dropout)
        allowed = None
        if isinstance(self.policy, Policy):
            ids = jnp.arange(len(self.policy.allowed))
            allowed = jnp.asarray(self.policy.allowed) & (ids != self.policy.mask_id)
        axes = View(row=0, draws=0, teacher=0, step=None, allowed=None)
        view = View(row=rows, draws=draws, teacher=teacher, step=step, allowed=allowed)
        return jax.vmap(self.readout, (0, axes))(logits, view)

    def _logits(
        self, variables: Variables, rows: Rollout, draws: Draws, dropout: Array | None
    ) -> Array:
        """[b, m, C, V]."""
        policy = self._of(variables)
        logits = policy.completion_logits(
            variables, *_corrupted(rows, draws, policy.mask_id, dropout)
        )
        return logits.reshape(*draws.masked.shape[:2], *logits.shape[1:])

    def _log_probs(
        self, variables: Variables, rows: Rollout, draws: Draws, dropout: Array | None
    ) -> Array:
        """`token_log_probs` [b, m, C], which holds the logits of a piece of the positions only.

        The backward pass unembeds each piece again.
        """
        policy, pieces = self._of(variables), self._pieces(rows, draws)
        hidden = policy.completion_hidden(  # [b m, C, D]
            variables, *_corrupted(rows, draws, policy.mask_id, dropout)
        )
        label = rows.completion[:, None] if draws.label is None else draws.label
        shape = (*draws.masked.shape[:2], rows.completion.shape[1])  # b, m, C
        label = jnp.broadcast_to(label, shape).reshape(hidden.shape[:2])  # [b m, C]

        def cut(x: Array) -> Array:
            """[b m, C, ...] -> [pieces, b m, C / pieces, ...]."""
            return jnp.moveaxis(x.reshape(len(x), pieces, -1, *x.shape[2:]), 1, 0)

        @jax.checkpoint
        def read(hidden: Array, label: Array) -> Array:
            return completion_log_probs(policy.unembed(variables, hidden), label)

        logp = jax.lax.map(lambda piece: read(*piece), (cut(hidden), cut(label)))
        return jnp.moveaxis(logp, 0, 1).reshape(shape)

    def _pieces(self, rows: Rollout, draws: Draws) -> int:
        """The pieces of the positions of a completion whose logits are held at once."""
        if not isinstance(self.policy, Policy):
            return 1  # Another model may have logits only.
        return logit_pieces(
            len(rows.reward) * draws.masked.shape[1] // current_row_shards(),
            rows.completion.shape[1],
            self.policy.config.vocab_size // current_shards('tensor'),
        )

    def _of(self, variables: Variables) -> Policy:
        """The policy without its adapters, if they are not among the parameters."""
        policy = self.policy
        if policy.config.lora and COLLECTION not in variables:
            without = dataclasses.replace(policy.config, lora=None)
            policy = dataclasses.replace(policy, config=without)
        return policy


def logit_pieces(rows: int, length: int, vocab_size: int) -> int:
    """The fewest equal pieces of the positions whose logits take at most LARGEST_LOGITS bytes.

    Args:
      rows: sequences on a device.
      length: C.
      vocab_size: the ids on a device.
    """
    for pieces in range(1, length):
        if length % pieces == 0 and 4 * rows * length // pieces * vocab_size <= LARGEST_LOGITS:
            return pieces
    return length


def _corrupted(
    rows: Rollout, draws: Draws, mask_id: int, dropout: Array | None
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """The arguments of `Policy.completion_hidden` for b x m corrupted sequences."""
    number, many, _ = draws.masked.shape
    prompt_length = rows.prompt.shape[1]
    if draws.tokens is None:
        tokens = jnp.concatenate([rows.prompt, rows.completion], axis=1)
        noisy = jax.vmap(apply_masks, (0, 0, None))(tokens, draws.masked, mask_id)
    else:
        noisy = jnp.where(draws.masked, mask_id, draws.tokens)
    noisy = noisy.reshape(number * many, -1)
    valid = None
    if draws.valid is not None:
        valid = draws.valid[:, :, prompt_length:].reshape(number * many, -1)
    return (
        noisy[:, :prompt_length],
        jnp.repeat(rows.prompt_mask, many, axis=0),
        noisy[:, prompt_length:],
        None if dropout is None else dropout.reshape(-1),
        valid,
    )
