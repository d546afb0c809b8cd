"""Measures the speed of rollout and update, and memory for different draws and lengths.

    python -m benchmarks.speed [--config=configs/sudoku.py]

The command prints one table. Speeds are shares of the highest rate of a matrix product that this
machine reaches in the same run. Each token costs 2 FLOPs per parameter in a forward pass and 4 in a
backward pass; attention is left out.
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from spg_jax import sharding
from spg_jax.assembly import assemble, model_of
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.process import cli
from spg_jax.random import Purpose, example_keys
from spg_jax.rl.collection import make_generate
from spg_jax.rl.learner import make_update
from spg_jax.rl.rollout import Rollout, empty_rollout
from spg_jax.runs import policies
from spg_jax.training import optimizers
from spg_jax.training.train_state import initial_state, shardings_of

FLAGS = flags.FLAGS
REPEATS = 5


def seconds(run: Callable[[], object]) -> float:
    """The median seconds of REPEATS runs, after one run that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def peak_flops(size: int = 2048) -> float:
    """FLOPs per second of the fastest of several square float32 products."""
    product = jax.jit(jnp.matmul)
    x = jnp.ones((size, size))
    jax.block_until_ready(product(x, x))
    return max(2 * size**3 / seconds(lambda: product(x, x)) for _ in range(3))


class Bench:
    """The programs of a configuration, with random parameters and a random rollout."""

    def __init__(self, config: ml_collections.ConfigDict):
        self.config, self.parts = config, assemble(config)
        self.mesh = sharding.make_mesh(config.mesh)
        tokenizer = WordTokenizer(self.parts.task.vocabulary)
        model = model_of(config, tokenizer.size, self.mesh.devices.flat[0].platform)
        self.policy = policies.make_policy(model, tokenizer)
        params = sharding.init_params(self.policy.model, jax.random.key(0), self.mesh)
        self.variables = {'params': params}
        self.size = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.rows = self.parts.batching.rows
        self.sequence = config.sampling.prompt_length + config.sampling.length

    def rollout(self) -> Rollout:
        """A rollout of random tokens: no row ends early, and the signs of advantages alternate."""
        lengths = self.config.sampling.prompt_length, self.config.sampling.length
        rollout = empty_rollout(self.rows, *lengths, self.mesh)
        random_ids = lambda shape: np.random.default_rng(0).integers(3, 11, shape, np.int32)  # noqa: E731
        return rollout.replace(
            prompt=jnp.asarray(random_ids(rollout.prompt.shape)),
            prompt_mask=jnp.ones(rollout.prompt.shape, bool),
            completion=jnp.asarray(random_ids(rollout.completion.shape)),
            scored=jnp.ones(rollout.completion.shape, bool),
            advantage=jnp.where(jnp.arange(self.rows) % 2, 0.5, -0.5),
            example_id=jnp.arange(self.rows, dtype=jnp.uint32),
        )

    def rollout_seconds(self) -> float:
        """Seconds to generate one rollout batch; with random parameters rows rarely end early."""
        generate = make_generate(self.policy, self.parts.sampling)
        rollout = self.rollout()
        keys = example_keys(0, Purpose.SAMPLE, 0, rollout.example_id)
        return seconds(lambda: generate(self.variables, rollout.prompt, rollout.prompt_mask, keys))

    def update(self) -> tuple[Callable, object, Rollout]:
        """The compiled update, a train state and a rollout."""
        parts, optimizer = self.parts, optimizers.for_rl(self.parts.optimizer, 100)
        state = initial_state(self.variables, optimizer, self.policy, self.mesh, average=False)
        shardings = shardings_of(state)
        update = make_update(self.policy, parts.objective, optimizer, parts.batching, 0, shardings)
        return update, state, self.rollout()

    def update_seconds(self) -> float:
        """Seconds of one update."""
        update, state, rollout = self.update()

        def run() -> object:
            nonlocal state
            state, metrics = update(state, rollout)
            return metrics

        return seconds(run)

    def update_bytes(self) -> int:
        """The temporary and output bytes of the compiled update."""
        update, state, rollout = self.update()
        memory = update.lower(state, rollout).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes


def main(_: Sequence[str]) -> None:
    config = FLAGS.config
    peak = peak_flops()
    table = Table('what', 'measured', 'share of peak', title=f'{peak / 1e9:.0f} GFLOP/s at most')
    with jax.set_mesh(sharding.make_mesh(config.mesh)):
        bench = Bench(config)
        took, passes = bench.rollout_seconds(), config.sampling.steps
        flops = 2 * bench.size * bench.rows * bench.sequence * passes
        table.add_row(
            'rollout', f'{bench.rows / took:.0f} completions/s', f'{flops / took / peak:.0%}'
        )
        took, tokens = bench.update_seconds(), bench.rows * bench.sequence * config.corruption.draws
        table.add_row(
            'update',
            f'{tokens / took:.0f} tokens/s',
            f'{6 * bench.size * tokens / took / peak:.0%}',
        )
        for per_pass in (0, 1):
            for draws in (2, 4, 8):
                # Unlike ConfigDict(config), this copies the groups too.
                changed = config.copy_and_resolve_references()
                changed.corruption.draws, changed.rl.draws_per_pass = draws, per_pass
                how = 'one draw a pass' if per_pass else 'all draws at once'
                size = Bench(changed).update_bytes()
                table.add_row(f'update memory, M={draws}, {how}', f'{size / 2**20:.0f} MiB', '')
        for factor in (1, 2, 4):
            changed = config.copy_and_resolve_references()
            changed.sampling.length = factor * config.sampling.length
            size = Bench(changed).update_bytes()
            table.add_row(
                f'update memory, C={changed.sampling.length}, M={config.corruption.draws}',
                f'{size / 2**20:.0f} MiB',
                '',
            )
    Console(width=100).print(table)


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', 'configs/sudoku.py', 'configs/TASK.py[:PRESET].')
    cli.run(main)
