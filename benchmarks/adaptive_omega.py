"""Measures what the share omega of the EUBO that minimises the gradient's variance would gain.

    python -m benchmarks.adaptive_omega --policy=DIR[,DIR…] [--redraws=128] [--draws=2,4]

Proposition 1 of SPG: with the gradients g_L of the ELBO and g_U of the EUBO of worse completions,

    omega* = -Cov(g_L, g_U - g_L) / Var(g_U - g_L)

minimises the variance of (1 - omega) g_L + omega g_U, for each coordinate by itself, or for all
with one omega, where covariance and variance are summed over coordinates. The rule for training
could only estimate these moments. Here they are computed from many redraws of the masks of one
rollout of the small Countdown preset, which no rule can surpass: half of the redraws give omega*,
the other half the variances that it leaves. Better completions add a gradient of their own, which
omega does not change. Variances are sums over coordinates, as shares of that of omega = 0.5.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax import Array
from jax.flatten_util import ravel_pytree

from configs import countdown
from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.process import cli
from spg_jax.rl.objectives import Batch, Objective
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import Reader, corrupt, moments
from spg_jax.runs.preparation import prepare

FLAGS = flags.FLAGS
SEED = 0


def main(_: Sequence[str]) -> None:
    columns = ('policy', 'M', 'omega*', 'var 0', 'var 1', 'var omega*', 'var each coordinate')
    columns += ('whole: var omega*', 'signal 0.5', 'signal omega*', 'cosine')
    print(f'| {" | ".join(columns)} |\n{"|---" * len(columns)}|', flush=True)
    for policy in FLAGS.policy:
        for draws in FLAGS.draws:
            better, lower, upper = gradients(Path(policy), int(draws), FLAGS.redraws)
            figures = compare(better, lower, upper)
            cells = [Path(policy).name, draws, *(f'{figure:.3f}' for figure in figures)]
            print(f'| {" | ".join(cells)} |', flush=True)


def settings(policy: Path, draws: int, negative: str) -> ml_collections.ConfigDict:
    """The small preset from a policy, with M draws."""
    config = countdown.get_config()
    config.base.checkpoint = str(policy)
    config.corruption.draws, config.spg.negative = draws, negative
    return config


def gradients(policy: Path, draws: int, redraws: int) -> tuple[np.ndarray, ...]:
    """Gradients [redraws, parameters] of better completions, and of worse ones by either bound."""
    config = settings(policy, draws, 'elbo')
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        parts = assemble(config)
        state, _, programs = prepare(config, parts, policy, mesh, config.train.steps)
        rollout, _ = programs.collect(state, next(programs.prompts), 0)
        upper = assemble(settings(policy, draws, 'eubo')).objective
        reader = Reader(programs.policy)
        trials = (
            (parts.objective, jnp.maximum(rollout.advantage, 0.0)),
            (parts.objective, jnp.minimum(rollout.advantage, 0.0)),
            (upper, jnp.minimum(rollout.advantage, 0.0)),
        )

        @jax.jit
        def once(step: Array) -> list[Array]:
            moment = moments(SEED, rollout, step, jnp.int32(0))
            masks = corrupt(parts.objective.corruption, rollout, moment)
            logp, pull_back = jax.vjp(
                lambda trained: reader(state.frozen | trained, rollout, masks, step), state.trained
            )

            def weights(objective: Objective, advantage: Array) -> Array:
                return jax.grad(loss_of(objective, rollout.replace(advantage=advantage), masks))(
                    logp
                )

            return [ravel_pytree(pull_back(weights(*trial))[0])[0] for trial in trials]

        rows = [jax.device_get(once(jnp.int32(step))) for step in range(redraws)]
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


def loss_of(objective: Objective, rollout: Rollout, masks: object) -> Callable[[Array], Array]:
    def value(logp: Array) -> Array:
        loss = objective.loss(logp, Batch(rollout, masks, {}, jnp.int32(0)))
        return loss.total / loss.weight

    return value


def best_omega(lower: np.ndarray, difference: np.ndarray) -> tuple[float, np.ndarray]:
    """omega* for all coordinates together, and for each; from gradients [redraws, parameters]."""
    centred = difference - difference.mean(0)
    covariance = ((lower - lower.mean(0)) * centred).mean(0)
    variance = np.square(centred).mean(0)
    each = np.where(variance > 0, -covariance / np.where(variance > 0, variance, 1.0), 0.5)
    return float(-covariance.sum() / variance.sum()), each


def compare(better: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> list[float]:
    """The figures of one row of the table."""
    half = len(lower) // 2
    difference = upper - lower
    omega, each = best_omega(lower[:half], difference[:half])
    better, lower, difference = better[half:], lower[half:], difference[half:]

    def variance(omega: float | np.ndarray, whole: bool = False) -> float:
        gradient = lower + omega * difference + (better if whole else 0.0)
        return float(gradient.var(0, ddof=1).sum())

    def mean(omega: float) -> np.ndarray:
        return (better + lower + omega * difference).mean(0)

    def signal(omega: float) -> float:
        """The square of the mean over the variance of the whole gradient, without bias."""
        noise = variance(omega, whole=True)
        return (float(np.square(mean(omega)).sum()) - noise / half) / noise

    published = variance(0.5)
    cosine = mean(0.5) @ mean(omega)
    cosine /= np.linalg.norm(mean(0.5)) * np.linalg.norm(mean(omega))
    return [
        omega,
        variance(0.0) / published,
        variance(1.0) / published,
        variance(omega) / published,
        variance(each) / published,
        variance(omega, whole=True) / variance(0.5, whole=True),
        signal(0.5),
        signal(omega),
        float(cosine),
    ]


if __name__ == '__main__':
    flags.DEFINE_list('policy', None, 'Directories of policies.', required=True)
    flags.DEFINE_list('draws', ['2', '4'], 'M, draws of a sequence.')
    flags.DEFINE_integer('redraws', 128, 'Redraws of all masks.')
    cli.run(main)
