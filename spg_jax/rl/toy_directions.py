"""What objectives do to a toy: the directions of their updates against the true policy gradient.

Letters of axes: `Q` prompts with the masked one, `X` completions, `C` positions, `V` vocabulary,
`E` entries of a table of logits, `W` parameters, `U` updates, `B` rows of an update, `T` turns.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spg_jax.diffusion import sampling
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.models.windows import Window
from spg_jax.rl.arrival import make_arrival
from spg_jax.rl.batching import Batching
from spg_jax.rl.gradient import make_gradient
from spg_jax.rl.objectives import Objective
from spg_jax.rl.objectives.objective import BEHAVIOUR
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import corrupt, moments
from spg_jax.rl.toys import (
    EOS,
    LENGTH,
    MASK,
    PROMPTS,
    SYMBOLS,
    VOCABULARY,
    TablePolicy,
    Toy,
    completion_index,
    law_gradients,
    lookup,
    quick,
    through_jacobian,
)
from spg_jax.training.train_state import TrainState

BUDGET = 16  # forward passes of each completion at which methods are compared
CHUNK = 64  # updates whose directions are in memory at once
BLOCKS = 8  # of updates, each left out in turn to estimate errors


class Direction(NamedTuple):
    """How the updates of an objective relate to the true policy gradient of a decoder.

    Every cosine is with that gradient, of the expected reward with respect to the parameters.
    """

    # Of the mean update, which noise does not lower; NaN where updates are too few to tell.
    cosine: float
    error: float  # standard error of `cosine`
    single: float  # of one update as the method makes it, the mean over updates
    budget: float  # of an update that reads each completion BUDGET times, by root mean square
    endless: float  # of an update with all draws that there are, by root mean square
    passes: float  # forward passes of each completion in one update


class Sample(NamedTuple):
    """A toy with what a decoder samples from it, and the true gradient of that decoder."""

    toy: Toy
    rollouts: Rollout  # [U, B, ...]
    gradient: np.ndarray  # [W] of the expected reward, as a mean over prompts
    # [U, W] updates of REINFORCE with the exact probability of each completion, minus their mean,
    # which is known: the noise that the choice of completions gives every method.
    noise: np.ndarray


def make_samples(
    toys: list[Toy], decoding: SamplingConfig, batching: Batching, updates: int
) -> list[Sample]:
    """Samples rollouts of a decoder from each toy, and enumerates its true gradient.

    Args:
      toys: whose policies are sampled.
      decoding: the decoder, with the records that objectives ask for.
      batching: the rows of an update.
      updates: U.
    """
    sample = make_sample(decoding, batching)
    keys = jax.random.split(jax.random.key(11), updates)
    first = toys[0]
    draw = quick(sample, first.table, first.reward, keys)
    laws = quick(lambda table: law_gradients(table, decoding), first.table)
    samples = []
    for toy in toys:
        law, slopes = laws(toy.table)
        of_law = np.asarray(through_jacobian(slopes, toy))  # [Q - 1, X, W]
        gradient = (np.asarray(toy.reward)[..., None] * of_law).sum(1).mean(0)
        law = np.asarray(law)[..., None]
        of_log_law = np.where(law > 0, of_law / np.maximum(law, 1e-30), 0.0)
        rollouts = draw(toy.table, toy.reward, keys)
        exact = exact_updates(rollouts, of_log_law, batching.group_size)
        mean = (batching.group_size - 1) * PROMPTS * gradient  # The baseline holds the row itself.
        samples.append(Sample(toy, rollouts, gradient, exact - mean))
    return samples


def measure(
    policy: TablePolicy, objective: Objective, batching: Batching, samples: list[Sample]
) -> Direction:
    """What an objective does to toys, as a mean over toys.

    Args:
      policy: of `toys.as_table`.
      objective: corrupts the rows of the samples, and makes a loss of them.
      batching: the rows of an update and the turns of a rollout.
      samples: of the decoder that the objective was built for.
    """
    updates = len(samples[0].rollouts.reward)
    chunk = min(CHUNK, updates)
    seeds = jnp.arange(updates, dtype=jnp.uint32)

    def parameters(toy: Toy, rollouts: Rollout, seeds: Array) -> Array:
        return directions(toy.table, rollouts, seeds) @ toy.jacobian  # [U, T, W]

    def piece(sample: Sample, start: int) -> tuple[Toy, Rollout, Array]:
        cut = slice(start, start + chunk)
        return sample.toy, jax.tree.map(lambda x: x[cut], sample.rollouts), seeds[cut]

    directions = make_directions(policy, objective, batching)
    compiled = quick(parameters, *piece(samples[0], 0))
    count = passes(objective, batching, jax.tree.map(lambda x: x[0], samples[0].rollouts))
    results = []
    for sample in samples:
        pieces = [np.asarray(compiled(*piece(sample, start))) for start in range(0, updates, chunk)]
        results.append(compare(np.concatenate(pieces), sample.gradient, count, sample.noise))
    return average(results)


def exact_updates(rollouts: Rollout, of_log_law: np.ndarray, group_size: int) -> np.ndarray:
    """The sum over rows of A grad log p, with p the probability under the decoder, [U, W].

    Args:
      rollouts: [U, B, ...].
      of_log_law: [Q - 1, X, W] gradients of log p.
      group_size: G, rows of a prompt; A is the reward minus the mean of the group.
    """
    reward = np.asarray(rollouts.reward).reshape(-1, PROMPTS, group_size)
    advantage = (reward - reward.mean(-1, keepdims=True)).reshape(len(reward), -1)
    index = completion_index(np.asarray(rollouts.completion))  # [U, B]
    prompt = np.asarray(rollouts.prompt)[..., 0]
    weight = np.zeros((len(reward), PROMPTS, SYMBOLS**LENGTH))
    np.add.at(weight, (np.arange(len(reward))[:, None], prompt, index), advantage)
    return np.einsum('uqx,qxw->uw', weight, of_log_law)


def of_exact_likelihood(samples: list[Sample]) -> Direction:
    """What REINFORCE with the exact probability of each completion does, as in `measure`."""
    results = []
    for sample in samples:
        mean = (np.asarray(sample.rollouts.reward).shape[1] // PROMPTS - 1) * PROMPTS
        updates = sample.noise + mean * sample.gradient
        results.append(compare(np.stack([updates, updates], 1), sample.gradient, 0.0))
    return average(results)


def compare(
    updates: np.ndarray, gradient: np.ndarray, passes: float, noise: np.ndarray | None = None
) -> Direction:
    """Cosines of updates with the true gradient.

    The squared norm of the mean update is estimated without the bias that noise gives it, from
    products of different rollouts, and the part of the noise that the draws bring from products of
    different turns of one rollout. An update of k turns then has the mean square
    c + (s - c) / k, with s that of one turn and c the product of two.

    Args:
      updates: [U, T, W], of U rollouts and T turns of each, T >= 2.
      gradient: [W], the true one.
      passes: forward passes of each completion in one turn.
      noise: [U, W] with mean 0. The multiple of it that takes most of the variance is subtracted
        from the updates of each rollout, which makes their mean less noisy and no other.
    """
    updates = np.asarray(updates, np.float64)
    unit = gradient / np.linalg.norm(gradient)
    turns = updates.shape[1]
    along = updates @ unit  # [U, T]
    squares = (updates**2).sum(-1)  # [U, T]
    sums = updates.sum(1)  # [U, W]
    products = ((sums**2).sum(-1) - squares.sum(1)) / (turns * (turns - 1))  # [U]
    means = sums / turns
    if noise is not None:
        share = ((means - means.mean(0)) * noise).sum() / (noise**2).sum()
        means = means - share * noise

    def cosine(kept: np.ndarray) -> float:
        total = means[kept].sum(0)
        pairs = kept.sum() * (kept.sum() - 1)
        square = (total @ total - (means[kept] ** 2).sum()) / pairs
        return total @ unit / kept.sum() / np.sqrt(square) if square > 0 else np.nan

    everything = np.ones(len(updates), bool)
    block = np.arange(len(updates)) % BLOCKS
    without = np.array([cosine(block != b) for b in range(BLOCKS)])
    error = np.sqrt((BLOCKS - 1) / BLOCKS * ((without - without.mean()) ** 2).sum())
    one, two = squares.mean(), max(products.mean(), 1e-30)
    mean = means.mean(0) @ unit
    single = np.where(squares > 0, along / np.sqrt(np.maximum(squares, 1e-30)), 0.0).mean()
    at_budget = max(two + (one - two) * passes / BUDGET, 1e-30)
    return Direction(
        cosine=cosine(everything),
        error=error,
        single=single,
        budget=mean / np.sqrt(at_budget),
        endless=mean / np.sqrt(two),
        passes=passes,
    )


def average(results: list[Direction]) -> Direction:
    """The mean over toys, whose errors are independent."""
    mean = Direction(*(float(np.mean(values)) for values in zip(*results, strict=True)))
    squares = sum(result.error**2 for result in results)
    return mean._replace(error=float(np.sqrt(squares)) / len(results))


def make_sample(decoding: SamplingConfig, batching: Batching) -> Callable[..., Rollout]:
    """A function (table, reward, keys [U]) -> the rollouts [U, B, ...] of as many updates.

    Completions come from the real sampler. Its records are those of `decoding`.
    """

    def sample(table: Array, reward: Array, key: Array) -> Rollout:
        def hidden(tokens: Array, valid: Array, window: Window) -> Array:
            logits = lookup(table, tokens[:, :1], tokens[:, 1:])
            return window.cut(jnp.pad(logits, ((0, 0), (1, 0), (0, 0))))

        return rollout_of(hidden, lambda hidden: hidden, reward, key, decoding, batching.group_size)

    return jax.vmap(sample, (None, None, 0))


def rollout_of(
    hidden: Callable[[Array, Array, Window], Array],
    unembed: Callable[[Array], Array],
    reward: Array,
    key: Array,
    decoding: SamplingConfig,
    group_size: int,
) -> Rollout:
    """A rollout [B, ...] of a toy, a group of each prompt, without advantages.

    Args:
      hidden, unembed: the model, as `sampling.generate` takes it.
      reward: [Q - 1, X] of each prompt and completion.
      key: [] of the random numbers.
      decoding: the decoder; a toy has no EOS.
      group_size: G.
    """
    prompt = np.repeat(np.arange(PROMPTS, dtype=np.int32), group_size)[:, None]  # [B, 1]
    completion = sampling.generate(
        hidden,
        unembed,
        jnp.asarray(prompt),
        jnp.ones(prompt.shape, bool),
        jax.random.split(key, len(prompt)),
        dataclasses.replace(decoding, stop_early=False),
        MASK,
        EOS,
        jnp.arange(VOCABULARY) < SYMBOLS,
    )
    rows = len(prompt)
    return Rollout(
        prompt=jnp.asarray(prompt),
        prompt_mask=jnp.ones(prompt.shape, bool),
        completion=completion.tokens,
        scored=jnp.ones((rows, LENGTH), bool),
        commit_step=completion.commit_step,
        reward=reward[prompt[:, 0], completion_index(completion.tokens)],
        advantage=jnp.zeros(rows),
        example_id=jnp.arange(rows, dtype=jnp.uint32),
        extras=completion.extras,
    )


def make_directions(
    policy: TablePolicy, objective: Objective, batching: Batching
) -> Callable[[Array, Rollout, Array], Array]:
    """A function (table, rollouts [U, B, ...], seeds [U]) -> update directions [U, T, E].

    A direction is minus the gradient of the loss with respect to the table, at the policy that
    sampled: that of each of the T = `batching.inner_updates` turns of a rollout, in which nothing
    but the draws changes. The reference and all kept policies equal the policy.
    """
    gradient_of = make_gradient(
        policy,
        objective,
        microbatch=batching.rows,
        draws_per_pass=0,
        group_size=batching.group_size,
    )

    def directions(table: Array, rollout: Rollout, seed: Array) -> Array:
        trained = {'params': table}
        state = TrainState(
            step=jnp.int32(0),
            trained=trained,
            frozen={},
            opt_state=None,
            average=None,
            skipped=jnp.int32(0),
            kept=dict.fromkeys(objective.kept, trained),
        )
        advantage = objective.advantage(rollout.reward, batching.group_size)
        rollout = rollout.replace(advantage=advantage)
        arrival = make_arrival(policy, objective, batching, seed)
        if arrival is not None:
            rollout = arrival(state, rollout)

        def of_turn(turn: Array) -> Array:
            draws = corrupt(objective.corruption, rollout, moments(seed, rollout, turn, turn))
            others = {}
            if objective.behaviour:
                others[BEHAVIOUR] = jax.tree.map(lambda x: x[:, turn], rollout.extras[BEHAVIOUR])
            _, gradient, _ = gradient_of(
                trained, {}, rollout, draws, None, others, state.kept, state.step
            )
            return -gradient['params'].reshape(-1)

        return jax.lax.map(of_turn, jnp.arange(batching.inner_updates, dtype=jnp.int32))

    return jax.vmap(directions, (None, 0, 0))


def passes(objective: Objective, batching: Batching, rollout: Rollout) -> float:
    """Forward passes of each completion in an update, without those of the sampler.

    Args:
      objective: which policies are read out, and how often.
      batching: the updates on a rollout, over which passes at its arrival are spread.
      rollout: of one update, [B, ...]; its shapes will do.
    """
    readers = 1 + objective.behaviour + len(objective.looks_at) + bool(objective.teacher)
    at_arrival = 0

    def read(name: str, draws: Any) -> Array:
        nonlocal at_arrival
        at_arrival += draws.masked.shape[1]
        return jnp.zeros((*draws.masked.shape[:2], LENGTH))

    if objective.at_rollout is not None:
        first = moments(0, rollout, jnp.int32(0), jnp.int32(0))
        jax.eval_shape(lambda rollout: objective.at_rollout(read, rollout, first), rollout)
    return objective.draws * readers + at_arrival / batching.inner_updates
