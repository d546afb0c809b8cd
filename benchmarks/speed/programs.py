"""The programs of a preset, with random parameters and data, and how long each takes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.counts import backward_flops, forward_flops
from benchmarks.speed.machine import times_and_peaks
from spg_jax import sharding
from spg_jax.assembly import assemble, model_of
from spg_jax.config import default_config
from spg_jax.data.demonstrations import Demonstrations
from spg_jax.data.tokenizers import SPECIALS, WordTokenizer
from spg_jax.models.policy import Policy
from spg_jax.presets import on_a_laptop
from spg_jax.random import Purpose, example_keys
from spg_jax.rl.collection import make_generate
from spg_jax.rl.learner import make_update
from spg_jax.rl.rollout import Rollout, empty_rollout
from spg_jax.rl.slots import make_stream
from spg_jax.runs import policies
from spg_jax.training import optimizers
from spg_jax.training.supervised import make_step
from spg_jax.training.train_state import initial_state, shardings_of

Row = dict[str, Any]  # a line of the table: JSON values
MOST_CALLS = 7  # of one program that are timed


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of a model and its batches."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int  # V, special tokens included
    prompt: int  # P
    completion: int  # C
    steps: int  # denoising steps of a completion
    block: int  # positions in a block
    rows: int  # B of rollout and update
    group: int  # G; advantages of a group are all zero, or none is
    draws: int = 2  # M
    unroll: int = 0  # layers in one iteration of the loop over layers; 0 takes all
    first_block_only: bool = False  # whether a rollout is measured in its first block, and scaled


PRESETS = {
    'small': Preset(64, 6, 4, 192, 256, 24, 24, 24, 8, rows=48, group=6),
    'medium': Preset(512, 8, 8, 2048, 4096, 64, 64, 32, 16, rows=12, group=3),
    'long': Preset(512, 8, 8, 2048, 4096, 64, 256, 128, 32, 4, 2, first_block_only=True),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does in one call.

    Attributes:
      run: calls the program, which is compiled already.
      row: what the table says about it beside time and FLOPs.
      flops: of the whole work, or None where that is unknown.
      scale: how many times the whole work takes as long as a call.
    """

    run: Callable[[], object]
    row: Row
    flops: float | None
    scale: int = 1


class Bench:
    """The programs of a preset; call everything under `jax.set_mesh(bench.mesh)`."""

    def __init__(self, preset: Preset):
        self.preset = preset
        config = default_config()
        on_a_laptop(config, preset.completion, preset.block)
        config.model.update(
            width=preset.width,
            layers=preset.layers,
            heads=preset.heads,
            kv_heads=preset.heads,
            mlp_width=preset.mlp_width,
            scan_unroll=preset.unroll or preset.layers,
        )
        config.sampling.update(prompt_length=preset.prompt, steps=preset.steps)
        config.evaluation.steps = (preset.steps,)
        config.corruption.draws = preset.draws
        config.rl.update(
            group_size=preset.group, prompts=preset.rows // preset.group, microbatch=preset.rows
        )
        self.parts, self.mesh = assemble(config), sharding.make_mesh(config.mesh)
        words = [f'w{number}' for number in range(preset.vocabulary - len(SPECIALS))]
        tokenizer = WordTokenizer(words)
        model = model_of(config, tokenizer.size, self.mesh.devices.flat[0].platform)
        self.policy = policies.make_policy(model, tokenizer)
        params = sharding.init_params(self.policy.model, jax.random.key(0), self.mesh)
        self.variables = {'params': params}
        self._random = np.random.default_rng(0)

    @property
    def _sequence(self) -> tuple[Any, int, int, int]:
        """The arguments of `forward_flops` for one reading of each row."""
        preset = self.preset
        length = preset.prompt + preset.completion
        return self.policy.config, preset.rows, length, preset.completion

    def rollout(self, ends_early: bool) -> Work:
        """Generates completions, of which none ends early or about half have ended at half length.

        The parameters are random, so that tokens are nearly uniform among the ids that are allowed:
        without EOS among them no row ends, and their number says how soon rows end otherwise.
        """
        preset, policy = self.preset, self.policy
        # (1 - 1/ids)**(C/2) = 1/2, where EOS is one of the ids
        ids = round(1 / (1 - 0.5 ** (2 / preset.completion)))
        count = ids - 1 if ends_early else None
        policy = _allowing(policy, count, with_eos=ends_early)
        scale = 1
        if preset.first_block_only and not ends_early:
            # Where every token is EOS, a rollout ends with its first block.
            policy, scale = _allowing(policy, 0, with_eos=True), preset.completion // preset.block
        batch = self._rollout()
        keys = example_keys(0, Purpose.SAMPLE, 0, batch.example_id)
        arguments = self.variables, batch.prompt, batch.prompt_mask, keys
        if ends_early:  # as a run does: rows that have ended make room
            stream = make_stream(policy, self.parts.sampling, preset.rows)
            list(stream(*arguments))  # compiles a program for each number of rows

            def run() -> object:
                return [completion for _, completion in stream(*arguments)]
        else:
            generate = _compiled(make_generate(policy, self.parts.sampling), arguments)

            def run() -> object:
                return generate(*arguments)

        model, rows, length, _ = self._sequence
        flops = preset.steps * forward_flops(model, rows, length, preset.block)
        row = {
            'what': 'rollout, answers of several lengths'
            if ends_early
            else 'rollout, none ends early',
            'count': rows,
            'unit': 'completions',
        }
        # How much of the work can be left out where rows end early is up to the sampler.
        return Work(run, row, None if ends_early else flops, scale)

    def update(self, live_share: float) -> Work:
        """Updates on a rollout in which this share of the groups has advantages."""
        preset, parts = self.preset, self.parts
        optimizer = optimizers.for_rl(parts.optimizer, 100)
        state = initial_state(self.variables, optimizer, self.policy, self.mesh, average=False)
        state = jax.tree.map(jnp.copy, state)  # An update takes its state over.
        shardings = shardings_of(state)
        program = make_update(self.policy, parts.objective, optimizer, parts.batching, 0, shardings)
        batch = self._rollout(live_share)
        update = _compiled(program, (state, batch))

        def run() -> object:
            nonlocal state
            state, metrics = update(program.seed, state, batch)
            return metrics

        model, rows, length, scored = self._sequence
        rows *= preset.draws
        flops = forward_flops(model, rows, length, scored)
        flops += backward_flops(model, rows, length, scored)
        name = 'dense' if live_share == 1 else f'{1 - live_share:.0%} of the rows idle'
        row = {
            'what': f'update, {name}',
            'count': rows * length,
            'unit': 'tokens',
            'bytes': _bytes(update),
        }
        return Work(run, row, flops if live_share == 1 else None)

    def pretraining_step(self) -> Work:
        """Steps of pre-training on the rows of a rollout."""
        optimizer = optimizers.for_pretraining(1e-3, 0.01, 1.0, 100)
        state = initial_state(self.variables, optimizer, self.policy, self.mesh, average=True)
        state = jax.tree.map(jnp.copy, state)
        step = make_step(self.policy, optimizer, 0, 0.99, shardings_of(state))
        rows = self._rollout()
        batch = Demonstrations(rows.prompt, rows.prompt_mask, rows.completion, rows.example_id)
        step = _compiled(step, (state, batch))

        def run() -> object:
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        model, rows, length, scored = self._sequence
        flops = forward_flops(model, rows, length, scored)
        flops += backward_flops(model, rows, length, scored)
        row = {
            'what': 'pre-training step',
            'count': rows * length,
            'unit': 'tokens',
            'bytes': _bytes(step),
        }
        return Work(run, row, flops)

    def _rollout(self, live_share: float = 1.0) -> Rollout:
        """A rollout of random words: no row ends early."""
        preset = self.preset
        rollout = empty_rollout(preset.rows, preset.prompt, preset.completion, self.mesh)

        def words(shape: tuple[int, ...]) -> np.ndarray:
            return self._random.integers(len(SPECIALS), preset.vocabulary, shape, np.int32)

        host = {
            'prompt': words(rollout.prompt.shape),
            'prompt_mask': np.ones(rollout.prompt.shape, bool),
            'completion': words(rollout.completion.shape),
            'scored': np.ones(rollout.completion.shape, bool),
            'advantage': advantages(preset.rows, preset.group, live_share),
            'example_id': np.arange(preset.rows, dtype=np.uint32),
        }
        return rollout.replace(**sharding.put_batch(self.mesh, host))


def advantages(rows: int, group: int, live_share: float) -> np.ndarray:
    """Advantages [B] of both signs in this share of the groups, and of 0 in the others."""
    row = np.arange(rows)
    is_live = row // group < round(live_share * (rows // group))
    return np.where(is_live, np.where(row % 2, 0.5, -0.5), 0.0).astype(np.float32)


def measure_preset(name: str, only: list[str], budget: float) -> list[Row]:
    """The rows of the table for a preset.

    Args:
      name: of PRESETS.
      only: parts of the benchmark, among them 'rollout', 'update' and 'pretraining'.
      budget: seconds for each row, beside compiling.
    """
    bench = Bench(PRESETS[name])
    works: list[Callable[[], Work]] = []
    if 'rollout' in only:
        works += [lambda: bench.rollout(False), lambda: bench.rollout(True)]
    if 'update' in only:
        works.append(lambda: bench.update(1.0))
        if bench.preset.rows // bench.preset.group >= 4:
            works.append(lambda: bench.update(0.25))
    if 'pretraining' in only:
        works.append(bench.pretraining_step)
    if bench.preset.first_block_only:  # The other rows would take minutes.
        works = works[:1] if 'rollout' in only else []
    with jax.set_mesh(bench.mesh):
        return [{'preset': name} | measured(work(), budget) for work in works]


def measured(work: Work, budget: float) -> Row:
    """The row of the table for work: how long it takes, and its share of the machine's peak.

    Args:
      work: what is called.
      budget: seconds for the calls together.
    """
    seconds, peaks = times_and_peaks(work.run, budget, MOST_CALLS)
    seconds = [work.scale * each for each in seconds]
    row = work.row | {
        'seconds': float(np.median(seconds)),
        'runs': len(seconds),
        'flops': work.flops,
    }
    if work.flops is not None:
        row['shares'] = [
            work.flops / each / peak for each, peak in zip(seconds, peaks, strict=True)
        ]
    return row


def _allowing(policy: Policy, words: int | None, with_eos: bool) -> Policy:
    """A policy that may choose that many words, all without a number, and EOS or not."""
    allowed = policy.allowed.copy()
    allowed[policy.eos_id] = False
    if words is not None:
        allowed[np.flatnonzero(allowed)[words:]] = False
    allowed[policy.eos_id] = with_eos
    return dataclasses.replace(policy, allowed=allowed)


def _compiled(program: Any, arguments: tuple[Any, ...]) -> Any:
    """The program compiled ahead, so that no call that is timed compiles."""
    return program.lower(*arguments).compile() if hasattr(program, 'lower') else program


def _bytes(program: Any) -> int | None:
    """Bytes of temporaries and results of a compiled program, if it tells."""
    memory = program.memory_analysis() if hasattr(program, 'memory_analysis') else None
    return memory and memory.temp_size_in_bytes + memory.output_size_in_bytes
