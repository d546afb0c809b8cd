"""An objective: how rows are corrupted, what is read out of policies, and a loss of the readouts.

The policy enters a loss only through readouts [B, M, C], one number for each draw and position of a
completion; by default the log-probability of the token. Everything else here says when a readout is
taken, of which policy, and how many rows the loss must see at once.

Letters of axes: `B` rows, `b` those that a loss sees at once, `G` rows of a group, `M` draws, `P`
tokens of a prompt, `C` positions of a completion, `L` = P + C, `V` vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from spg_jax.diffusion.bounds import completion_log_probs
from spg_jax.diffusion.corruption import Corruption, Draws
from spg_jax.diffusion.prompt_grid import on_prompt_grid
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.rl.advantages import group_advantages
from spg_jax.rl.batching import Batching
from spg_jax.rl.rollout import Rollout

Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, weight)
# Names of policies: the one that sampled a rollout, and the initial one.
BEHAVIOUR, REFERENCE = 'behaviour', 'reference'
PPO, UNCONDITIONAL = 'ppo', 'unconditional'  # how a ratio is clipped; see `ratios.clipped`


@struct.dataclass
class Moment:
    """When and where a row is corrupted.

    `turn` counts the updates since the rollout arrived. What a method draws once a rollout uses the
    keys `at_rollout`, which are those of turn 0.
    """

    row: Array  # [] key of this row and turn
    shared: Array  # [] key of this turn, the same for all rows
    row_at_rollout: Array  # [] key of this row, the same for all turns
    shared_at_rollout: Array  # [] key that all rows and turns share
    turn: Array  # [] int32
    rank: Array  # [] int32, the place of the row in the batch of an update


@struct.dataclass
class View:
    """What a readout sees of one row beside the logits."""

    row: Rollout
    draws: Draws
    teacher: Array | None  # [M, C, V] logits of the policy `Objective.teacher`
    step: Array  # [] int32, updates done
    allowed: Array | None = None  # [V] bool, ids that are drawn; None where only logits are known


@struct.dataclass
class Batch:
    """Rows of a rollout with the draws of one update, as a loss sees them."""

    rows: Rollout  # [b, ...]
    draws: Draws  # [b, M, ...]
    others: dict[str, Array]  # readouts [b, M, C] of 'behaviour' and of policies looked at
    step: Array  # [] int32, updates done
    clip: str = struct.field(pytree_node=False, default=PPO)  # how ratios are clipped

    @property
    def completion(self) -> Array:
        """[b, C] int32."""
        return self.rows.completion

    @property
    def scored(self) -> Array:
        """[b, C] bool, True through the first EOS."""
        return self.rows.scored

    @property
    def advantage(self) -> Array:
        """[b] float32."""
        return self.rows.advantage

    @property
    def masked(self) -> Array:
        """[b, M, C] bool, True where the draw masks a completion token."""
        return self.draws.masked[:, :, self.rows.prompt.shape[1] :]

    @property
    def block(self) -> Array:
        """[b, M] int32, the block that each draw chose."""
        return self.draws.block

    @property
    def target(self) -> Array:
        """[b, M, C] bool, True where the readout of a draw enters the loss."""
        if self.draws.target is not None:
            return self.draws.target
        return self.masked & self.scored[:, None, :]


@struct.dataclass
class Loss:
    """A loss as a sum and its weight.

    The division happens once after all microbatches, so that their sizes do not change the loss.
    """

    total: Array  # [] float32, differentiated with respect to the readouts
    weight: Array  # [] float32, which does not depend on the policy
    metrics: Metrics


Advantage = Callable[[Array, int], Array]  # (reward [B], G) -> [B], whole groups of neighbours
Corrupt = Callable[[Rollout, Moment], Draws]  # one row -> its M draws
# (logits [M, C, V], view of one row) -> [M, C], or a pytree of several such arrays
Readout = Callable[[Array, View], Any]
Refresh = Callable[[Array, Any, Any], Any]  # (updates done, kept, trained) -> kept
Idle = Callable[[Batch], Array]  # all rows of an update -> [B] bool


class LogProbs:
    """The class of readouts [M, C] that are log-probabilities of tokens under another law."""


def token_log_probs(logits: Array, view: View) -> Array:
    """The readout of most methods: log-probability of each token, in nats, [M, C] float32."""
    label = view.row.completion if view.draws.label is None else view.draws.label
    return completion_log_probs(logits, label)


def never(step: Array, kept: Any, trained: Any) -> Any:
    """The `Refresh` of a policy that stays as it is."""
    return kept


def without_advantage(batch: Batch) -> Array:
    """The `Idle` of losses that are a sum over rows of a multiple of their advantage, [B] bool."""
    return batch.advantage == 0


@dataclasses.dataclass(frozen=True)
class Configured:
    """A `Corrupt` whose masks a `Corruption` draws."""

    corruption: Corruption

    def __call__(self, row: Rollout, moment: Moment) -> Draws:
        return self.corruption(moment.row, row.prompt_mask, row.scored, row.extras.get('influence'))


def configured(corruption: Corruption) -> Configured:
    """The corruption of `config.corruption`, for an objective that has none of its own.

    The objective then takes over `Corruption.records`, which informed masking needs.
    """
    return Configured(corruption)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Updates learn from random rows of a ring, whose oldest rows are replaced.

    Attributes:
      prompts: prompts in the ring; a multiple of those that are collected at once.
      every: updates between two collections.
      rows: rows of an update.
      first: the rows that an update takes before all others, [B] bool of the whole ring; None takes
        every row equally often.
    """

    prompts: int
    every: int
    rows: int
    first: Callable[[Rollout], Array] | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """A cycle of updates, at whose end policies change roles.

    The optimiser then starts anew, with its schedule, and a ring is filled anew.

    Attributes:
      length: updates of a phase.
      end: (trained, kept policies by name) -> the same of the next phase.
    """

    length: int
    end: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A policy-gradient method.

    Attributes:
      corruption: how a row is corrupted, afresh at every update.
      draws: M.
      loss: (readouts [b, M, C], Batch) -> Loss.
      couples: what the loss must see at once: 'row', 'group' or 'batch'. The learner keeps groups
        whole, or reads out all rows first and then differentiates with fixed weights.
      advantage: of the rewards of whole groups.
      readout: what is read out of logits.
      behaviour: whether the loss looks at the readouts of the policy that sampled the rollout. They
        are taken when the rollout arrives, for the draws of all its turns.
      looks_at: policies that are read out at each update, without a gradient: 'reference', which is
        the initial policy, or kept ones.
      teacher: the policy whose logits the readout sees; '' for none.
      kept: policies beside the trained one, and how each changes after an update. The initial
        policy is not copied where adapters are trained, because it is the model without them.
      sampled_by: the kept policy that samples rollouts; '' is the trained one.
      at_rollout: (read, rollout, moments of turn 0 [B]) -> extras [B, ...], computed when a rollout
        arrives; read(policy, draws) gives readouts [B, M, C] of 'policy' or another.
      experience: what updates learn from; None is the last rollout, `rl.inner_updates` times.
      phase: what changes at the end of a phase; None without phases.
      rate: the learning rate as a share of `optimizer.learning_rate`, of the updates since the
        optimiser started; None is the configured schedule.
      compares: whether completions are compared within their group, which then needs two or more.
      records: what the sampler records of each token, names of `sampling.RECORDS`; they are
        extras of the rollout.
      idle: the rows whose readouts move neither the gradient nor that of other rows, so that they
        leave the update: (Batch of all rows) -> [B] bool; None: every row can move it. They still
        count in the weight. Metrics that depend on readouts are then those of the other rows. Where
        a loss couples groups, only groups leave that are idle as a whole; where it couples the
        batch, it sees the readout 0 of idle rows. The readout must be one array [M, C].
      edits: whether it reads the draft and the edits that a sampler recorded (`samplers.editing`).
        Others that read what was recorded of the tokens drawn refuse a sampler that edits.
      needs_law: whether the product of the recorded probabilities, 'log_prob', must be the law of
        the completions. A sampler where it is not is refused.
      clips: whether the loss clips ratios with `ratios.token_losses` or `sequences.clipped_rows`,
        which follow `Batch.clip`.
      refuses: the plug-ins (`rl.plug_ins`) that have no meaning for this method, each with the
        reason, by GROUP.KEY of their setting or by GROUP.KEY=VALUE.
    """

    corruption: Corrupt
    draws: int
    loss: Callable[[Any, Batch], Loss]
    couples: str = 'row'
    advantage: Advantage = group_advantages
    readout: Readout = token_log_probs
    behaviour: bool = False
    looks_at: tuple[str, ...] = ()
    teacher: str = ''
    kept: Mapping[str, Refresh] = dataclasses.field(default_factory=dict)
    sampled_by: str = ''
    at_rollout: Callable[..., dict[str, Array]] | None = None
    experience: Ring | None = None
    phase: Phase | None = None
    rate: Callable[[Array], Array] | None = None
    compares: bool = True
    records: tuple[str, ...] = ()
    idle: Idle | None = None
    edits: bool = False
    needs_law: bool = False
    clips: bool = False
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What an objective is given to be built with: the protocol's part of the settings."""

    corruption: Corruption  # as configured; methods with a corruption of their own leave it
    sampling: SamplingConfig  # of rollouts
    batching: Batching

    @property
    def rollout_steps(self) -> int:
        """The steps that `Rollout.commit_step` counts.

        A model whose blocks are counted from the prompt takes more than `sampling.steps`.
        """
        on_grid = self.corruption.from_prompt
        return (on_prompt_grid(self.sampling) if on_grid else self.sampling).steps


def setting(default: Any, meaning: str) -> Any:
    """A field of an objective's `Settings`: its published value, and what it means."""
    return dataclasses.field(default=default, metadata={'meaning': meaning})


@dataclasses.dataclass(frozen=True)
class Method:
    """How an objective is made.

    Attributes:
      settings: a dataclass, whose fields are the settings of the group with the objective's name.
      build: (settings, Protocol) -> Objective; raises ValueError for settings without a meaning.
      recipe: published values of other settings, by GROUP.KEY, for `rl.recipe='published'`.
    """

    settings: type
    build: Callable[[Any, Protocol], Objective]
    recipe: Mapping[str, Any]


def over_groups(
    loss_of_group: Callable[[Any, Batch], tuple[Array, Metrics]], group_size: int
) -> Callable[[Any, Batch], Loss]:
    """The mean over groups of a loss that is published for one group.

    Args:
      loss_of_group: (readouts [G, M, C], Batch of the group) -> (loss [], metrics).
      group_size: G.
    """

    def loss(readouts: Any, batch: Batch) -> Loss:
        values, metrics = over_units(loss_of_group, group_size)(readouts, batch)
        metrics = jax.tree.map(lambda x: x.sum(0), metrics)
        return Loss(total=values.sum(), weight=jnp.float32(len(values)), metrics=metrics)

    return loss


def over_units(function: Callable[[Any, Batch], Any], size: int) -> Callable[[Any, Batch], Any]:
    """A function of some neighbouring rows, mapped over a batch of them.

    Args:
      function: (readouts [size, M, C], Batch of these rows) -> a pytree.
      size: rows of a unit, such as G; it divides those of the batch.

    Returns:
      (readouts [b, M, C], Batch) -> the same pytree with a leading axis of b / size.
    """

    def mapped(readouts: Any, batch: Batch) -> Any:
        def split(x: Array) -> Array:
            return x.reshape(len(x) // size, size, *x.shape[1:])

        parts = {'rows': batch.rows, 'draws': batch.draws, 'others': batch.others}
        axes = Batch(rows=0, draws=0, others=0, step=None, clip=batch.clip)
        return jax.vmap(function, (0, axes))(
            jax.tree.map(split, readouts), batch.replace(**jax.tree.map(split, parts))
        )

    return mapped
