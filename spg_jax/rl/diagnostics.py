"""Signs of collapse that cost a forward pass: entropy and divergences on fixed completions.

The completions are those of the first rollout. They are masked once, as decoding by blocks meets
them: blocks before a random one are clean, some of its positions and all later ones are masked. At
each masked position a policy has a distribution over tokens, and three numbers say where it goes:

    entropy = -sum_v p(v) log p(v)
    kl_to_base = KL(p | p of the base policy)
    kl_step = KL(p | p at the diagnosis before)

all in nats, as means over the masked positions. An earlier distribution is not kept whole but as a
`Sketch`, its K likeliest tokens and the rest as one. A divergence between sketches is at most the
divergence itself, and equal to it where the vocabulary has no more than K tokens. So no copy of any
parameters is kept, and the base policy is read once, at the start, also where every parameter is
trained.

Shapes: `B` rows, `C` positions of a completion, `V` vocabulary, `K` tokens of a sketch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from spg_jax.diffusion.corruption import Corruption, Draws
from spg_jax.models.policy import Policy
from spg_jax.random import Purpose, Seeded, example_keys
from spg_jax.rl.batching import Batching
from spg_jax.rl.objectives.objective import View
from spg_jax.rl.rollout import Rollout, rollout_shapes
from spg_jax.rl.scores import Reader
from spg_jax.sharding import constrain_rows
from spg_jax.training.train_state import Metrics, TrainState

TOKENS = 128  # the largest K; the vocabularies of models for a laptop are smaller


@struct.dataclass
class Sketch:
    """The likeliest tokens of a policy at each position; after them comes all the rest."""

    token: Array  # [B, C, K] int32
    log_prob: Array  # [B, C, K] float32, in nats


@struct.dataclass
class Probe:
    """What diagnoses compare with; it is saved with the checkpoints."""

    rows: Rollout  # [B, ...] the first rollout, without extras
    base: Sketch  # of the policy before the first update
    before: Sketch  # of the policy at the diagnosis before


class Diagnosis(NamedTuple):
    """Compiled functions that diagnose a policy."""

    begin: Callable[[TrainState, Rollout], Probe]
    look: Callable[[TrainState, Probe], tuple[Probe, Metrics]]


def make_diagnosis(policy: Policy, batching: Batching, block_length: int, seed: int) -> Diagnosis:
    """The functions that begin to diagnose a policy, and diagnose it.

    Args:
      policy: the model.
      batching: the rows that are read at once.
      block_length: positions in a block of decoding.
      seed: the root of the run's random numbers.
    """
    corruption = Corruption(
        'block', draws=1, block_length=block_length, prompt_rate=0.0, perturb_completion=False
    )

    def masks(seed: Array, rows: Rollout) -> Draws:
        keys = example_keys(seed, Purpose.DIAGNOSE, 0, rows.example_id)
        return jax.vmap(corruption)(keys, rows.prompt_mask, rows.scored)

    def read(
        state: TrainState, rows: Rollout, draws: Draws, readout: Callable[[Array, View], Any]
    ) -> Any:
        """The readout of all rows, a microbatch at a time."""
        reader = Reader(policy, readout)
        parts = len(rows.reward) // batching.microbatch

        def read_part(piece: tuple[Rollout, Draws]) -> Any:
            return reader(state.variables, *piece, state.step)

        pieces = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), (rows, draws)
        )
        return jax.tree.map(
            lambda x: constrain_rows(jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])),
            jax.lax.map(read_part, pieces),
        )

    def begin(seed: Array, state: TrainState, rollout: Rollout) -> Probe:
        rows = rollout.replace(extras={})
        draws = masks(seed, rows)
        base = read(state, rows, draws, lambda logits, view: sketch(_log_probs(logits)))
        return Probe(rows=constrain_rows(rows), base=base, before=base)

    def look(seed: Array, state: TrainState, probe: Probe) -> tuple[Probe, Metrics]:
        def readout(logits: Array, view: View) -> tuple[Sketch, dict[str, Array]]:
            log_probs = _log_probs(logits)
            earlier = view.row.extras
            figures = {
                'entropy': -(jnp.exp(log_probs) * log_probs).sum(-1),
                'kl_to_base': divergence(log_probs, earlier['base']),
                'kl_step': divergence(log_probs, earlier['before']),
            }
            return sketch(log_probs), figures

        extras = {'base': probe.base, 'before': probe.before}
        draws = masks(seed, probe.rows)
        now, figures = read(state, probe.rows.replace(extras=extras), draws, readout)
        masked = draws.masked[:, 0, -probe.rows.completion.shape[1] :]
        target = masked & probe.rows.scored  # [B, C]
        positions = target.sum().astype(jnp.float32)
        metrics = {
            name: (jnp.where(target, values, 0.0).sum(), positions)
            for name, values in figures.items()
        }
        return probe.replace(before=now), metrics

    return Diagnosis(Seeded(begin, seed), Seeded(look, seed))


def sketch(log_probs: Array) -> Sketch:
    """The K likeliest tokens of each distribution [C, V]."""
    log_prob, token = jax.lax.top_k(log_probs, min(TOKENS, log_probs.shape[-1]))
    return Sketch(token=token.astype(jnp.int32), log_prob=log_prob)


def divergence(log_probs: Array, earlier: Sketch) -> Array:
    """The Kullback-Leibler divergence of distributions [C, V] from earlier ones, in nats, [C]."""
    now = jnp.take_along_axis(log_probs, earlier.token, axis=-1)  # [C, K]
    among = (jnp.exp(now) * (now - earlier.log_prob)).sum(-1)  # [C]
    if earlier.token.shape[-1] == log_probs.shape[-1]:
        return among
    # Rounding may leave nothing, or less, where the sketch has all the probability.
    rest, rest_before = (
        jnp.maximum(1.0 - jnp.exp(x).sum(-1), 1e-7) for x in (now, earlier.log_prob)
    )
    return among + rest * (jnp.log(rest) - jnp.log(rest_before))


def probe_shapes(rows: int, prompt_length: int, length: int, vocab_size: int) -> Probe:
    """A probe as `jax.ShapeDtypeStruct`, such as a saved one is restored into.

    Args:
      rows: B.
      prompt_length: P.
      length: C.
      vocab_size: V.
    """
    shape = (rows, length, min(TOKENS, vocab_size))
    empty = Sketch(
        token=jax.ShapeDtypeStruct(shape, jnp.int32),
        log_prob=jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    return Probe(rows=rollout_shapes(rows, prompt_length, length), base=empty, before=empty)


def _log_probs(logits: Array) -> Array:
    """[1, C, V] logits of one draw -> [C, V] float32."""
    return jax.nn.log_softmax(logits[0].astype(jnp.float32), axis=-1)
