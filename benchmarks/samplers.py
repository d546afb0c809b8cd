"""Measures samplers on trained policies: tokens per second and accuracy, against the exact sampler.

    python -m benchmarks.samplers --workdir=RUN [--workdir=…] [--temperature=1 --group=8]
    python -m benchmarks.samplers --endings  # rows that end early: whole batches against slots

A --workdir is a run, or a policy trained here. The first command decodes test problems with each
sampler of VARIANTS, in turn with the exact one, as a rollout does, and prints a table and one JSON
line. At temperature 0 it says what evaluations would lose, and at 1 with groups of completions of
each problem what rollouts do. Accuracy is the mean over the policies, with its standard error over
all problems; 'difference' is that to the exact sampler on the same problems, with the half-width of
its 95 % interval. 'same' is the share of completions that equal those of the exact sampler.
'passes' are those of the first batch, and 'tokens_per_pass' is how many tokens a pass commits in a
row that has not ended, over the rows. 'speed' is the median over pairs of runs of how many times as
fast a sampler is, with quartiles, and 'cpu' the same of the CPU seconds of this process, which
other processes disturb less. The second command needs no policy: a random model, whose rows end at
positions that are spread over the completion.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.data.batches import left_pad
from spg_jax.data.prompts import prompt_tokens
from spg_jax.diffusion.sampling import Completion, SamplingConfig
from spg_jax.models.policy import Policy, Variables
from spg_jax.models.transformer import Cache, TransformerConfig
from spg_jax.models.windows import Window
from spg_jax.process import cli
from spg_jax.random import Purpose, example_keys
from spg_jax.rl.collection import decode, make_generate
from spg_jax.rl.slots import Part, in_order, make_stream
from spg_jax.runs import policies
from spg_jax.runs.directory import chosen_policy

FLAGS = flags.FLAGS

Figures = dict[str, Any]  # JSON values

ROWS = 256  # that are decoded at once
EXACT: dict[str, Any] = {}  # the sampler of the configuration's evaluation
# What each changes in it. A function gives the value for the usual decoding.
VARIANTS: dict[str, dict[str, Any]] = {
    'prefix cache': {'cache': 'prefix'},
    'dual cache': {'cache': 'dual'},
    'dual cache, refresh 2': {'cache': 'dual', 'refresh': 2},
    'threshold 0.9': {'sampler': 'threshold', 'threshold': 0.9},
    'threshold 0.99': {'sampler': 'threshold', 'threshold': 0.99},
    'factor 1': {'sampler': 'factor', 'factor': 1.0},
    'entropy_bounded 0.1': {'sampler': 'entropy_bounded', 'entropy_bound': 0.1},
    'remask': {'sampler': 'remask', 'threshold': 0.5},
    'dual, threshold 0.9': {'cache': 'dual', 'sampler': 'threshold', 'threshold': 0.9},
    'dual, factor 1': {'cache': 'dual', 'sampler': 'factor', 'factor': 1.0},
    'llada2 0.7': {'sampler': 'llada2', 'threshold': 0.7},
    'dual, llada2 0.7': {'cache': 'dual', 'sampler': 'llada2', 'threshold': 0.7},
    'dual, llada2 0.6': {'cache': 'dual', 'sampler': 'llada2', 'threshold': 0.6},
    'dual, entropy 0.1': {'cache': 'dual', 'sampler': 'entropy_bounded', 'entropy_bound': 0.1},
    'dual, entropy 0.3': {'cache': 'dual', 'sampler': 'entropy_bounded', 'entropy_bound': 0.3},
    # Decoding at test time, of policies that were trained with low confidence, a token a step.
    'by entropy': {'commit': 'entropy'},
    'by margin': {'commit': 'margin'},
    'left to right': {'commit': 'left_to_right'},
    'random order': {'commit': 'random'},
    'blocks of 2': {'block_length': 2},
    'no blocks': {'block_length': lambda usual: usual.length},
    'two tokens a step': {'steps': lambda usual: usual.length // 2},
}
# (rows, slots, completion tokens, where rows end) of the second command. With fewer slots than rows
# slots are refilled, and the other side generates one batch of that size after another.
ENDINGS = (
    (64, 64, 24, 'uniform'),
    (64, 64, 24, 'none'),
    (24, 24, 64, 'early'),
    (72, 24, 24, 'early'),
)
SMALL = {'width': 64, 'layers': 6, 'heads': 4, 'kv_heads': 4, 'mlp_width': 192}


@dataclasses.dataclass(frozen=True, eq=False)
class Ending(Policy):
    """A policy whose rows have their only EOS at a place that their prompt decides.

    A further component of hidden states is 1 at that place.
    """

    prompt_length: int = 0
    length: int = 0
    where: str = 'uniform'

    def mark(self, tokens: Array) -> Array:
        """[B, L] float32, 1 at the end of each row."""
        weights = jnp.arange(1, self.prompt_length + 1) * 7919
        number = (tokens[:, : self.prompt_length] * weights[None, :]).sum(-1) % 9973  # [B]
        share = number / 9973
        if self.where == 'early':  # the mean of a square is a third, that of a share a half
            share = share**2
        end = (share * self.length).astype(jnp.int32) + (self.where == 'none') * self.length
        position = jnp.arange(tokens.shape[1]) - self.prompt_length
        return (position[None, :] == end[:, None]).astype(jnp.float32)

    def hidden(
        self,
        variables: Variables,
        tokens: Array,
        valid: Array,
        dropout: Array | None = None,
        window: Window | None = None,
    ) -> Array:
        hidden = super().hidden(variables, tokens, valid, dropout, window)
        mark = self.mark(tokens)[:, :, None]  # [B, L, 1]
        return jnp.concatenate([hidden, window.cut(mark) if window else mark], axis=-1)

    def hidden_with_cache(
        self,
        variables: Variables,
        tokens: Array,
        valid: Array,
        cache: Cache,
        start: Array,
        window: Window | None = None,
    ) -> tuple[Array, Cache]:
        raise NotImplementedError

    def unembed(self, variables: Variables, hidden: Array) -> Array:
        logits = super().unembed(variables, hidden[..., :-1])
        is_eos = (jnp.arange(logits.shape[-1]) == self.eos_id)[None, None, :]
        return jnp.where(is_eos, 2e4 * hidden[..., -1:] - 1e4, logits)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    started = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - started[0], time.process_time() - started[1]


def pairs(first: Callable[[], object], second: Callable[[], object], count: int) -> np.ndarray:
    """The seconds of two programs in turn, [count, 2, wall and CPU], after each has run once."""
    jax.block_until_ready((first(), second()))
    return np.array([(seconds(first), seconds(second)) for _ in range(count)])


def speeds(times: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """The median and the quartiles of how many times as fast the second program is."""
    ratios = times[:, 0] / times[:, 1]  # [count, 2]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75), axis=0).tolist()
    return dict(zip(('speed', 'cpu'), zip(median, low, high, strict=True), strict=True))


def compare_samplers(workdirs: Iterable[str], problems: int, count: int) -> Iterator[Figures]:
    """The figures of each variant over the policies."""
    rows: dict[str, dict[str, list]] = {}
    for workdir in workdirs:
        for name, figures in of_one_policy(workdir, problems, count):
            merged = rows.setdefault(name, {key: [] for key in figures})
            for key, values in figures.items():
                merged[key] += values
    exact = np.array(rows['exact']['right'], float)
    for name, figures in rows.items():
        difference = np.array(figures['right'], float) - exact
        yield {
            'sampler': name,
            'tokens_per_second': round(float(np.mean(figures['rate']))),
            'passes': float(np.mean(figures['passes'])),
            'tokens_per_pass': float(np.mean(figures['tokens_per_pass'])),
            **speeds(np.array(figures['times'])),
            'accuracy': float(np.mean(figures['right'])),
            'standard_error': float(np.std(figures['right']) / len(figures['right']) ** 0.5),
            'difference': float(np.mean(difference)),
            'interval': float(1.96 * np.std(difference) / len(difference) ** 0.5),
            'same': float(np.mean(figures['same'])),
        }


def of_one_policy(
    workdir: str, problems: int, count: int
) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """The figures of each variant on one policy, as lists that are joined over policies."""
    config, directory, _ = chosen_policy(workdir, '', '', None)
    parts, mesh = assemble(config), sharding.make_mesh(config.mesh)
    task = parts.evaluation_task
    examples = list(task.source('test', config.task.data_dir))[:problems]
    with jax.set_mesh(mesh):
        policy, tokenizer, variables = policies.load_policy(
            directory, mesh, None, **parts.execution
        )
        prompts = [prompt_tokens(task, tokenizer, example) for example in examples]
        examples = [example for example in examples for _ in range(FLAGS.group)]
        prompts = [prompt for prompt in prompts for _ in range(FLAGS.group)]
        prompt, mask = left_pad(prompts, parts.prompt_lengths[-1], tokenizer.pad_id)
        keys = example_keys(0, Purpose.EVALUATE, 0, np.arange(len(examples), dtype=np.uint32))

        def decoding_of(change: dict[str, Any]) -> SamplingConfig:
            usual = parts.evaluation.headline
            values = {name: x(usual) if callable(x) else x for name, x in change.items()}
            return dataclasses.replace(usual, temperature=FLAGS.temperature, **values)

        def program(decoding: SamplingConfig) -> Callable[[], Completion]:
            generate = in_order(make_stream(policy, decoding, ROWS, FLAGS.group))

            def run() -> Completion:
                parts = [
                    generate(variables, *(x[first : first + ROWS] for x in (prompt, mask, keys)))
                    for first in range(0, len(examples), ROWS)
                ]
                return jax.tree.map(lambda *parts: np.concatenate(parts), *parts)

            return run

        exact = program(decoding_of(EXACT))
        reference = np.asarray(exact().tokens)
        chosen = {name: VARIANTS[name] for name in FLAGS.sampler or VARIANTS}
        for name, change in {'exact': EXACT, **chosen}.items():
            decoding = decoding_of(change)
            run = program(decoding)
            completion = run()
            tokens, steps = np.asarray(completion.tokens), np.asarray(completion.commit_step)
            texts = decode(tokenizer, tokens, keep_specials=task.scorer == 'published')
            solved = [task.score(*each).solved for each in zip(texts, examples, strict=True)]
            times = pairs(exact, run, count)
            yield (
                name,
                {
                    'right': np.reshape(solved, (-1, FLAGS.group)).mean(-1).tolist(),
                    'same': (tokens == reference).all(-1).tolist(),
                    'times': times.tolist(),
                    'rate': [float((steps >= 0).sum() / np.median(times[:, 1, 0]))],
                    'passes': [passes_of(steps[:ROWS], decoding)],
                    'tokens_per_pass': [tokens_per_pass(steps, decoding)],
                },
            )


def passes_of(steps: np.ndarray, decoding: SamplingConfig) -> int:
    """How many passes a batch took, from its commit steps [B, C]: in each block those of its
    slowest row."""
    block = steps // decoding.steps_per_block
    within = steps % decoding.steps_per_block
    return sum(
        int(within[block == each].max() + 1) for each in range(decoding.blocks) if each in block
    )


def tokens_per_pass(steps: np.ndarray, decoding: SamplingConfig) -> float:
    """How many tokens a pass commits in a row, from commit steps [B, C], which are -1 elsewhere."""
    passes = sum(passes_of(row[None], decoding) for row in steps)
    return int((steps >= 0).sum()) / passes


def compare_endings(count: int) -> Iterator[Figures]:
    """Whole batches against slots, where rows end at different places; the tokens are compared."""
    model = TransformerConfig(
        vocab_size=256, **SMALL, tie_embeddings=True, scale_logits=True, attention='folded'
    )
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        for case in ENDINGS:
            yield of_one_ending(model, mesh, *case, count)


def of_one_ending(
    model: TransformerConfig, mesh: Mesh, rows: int, slots: int, length: int, where: str, count: int
) -> Figures:
    """One case of ENDINGS."""
    policy = Ending(model, 0, 1, np.arange(256) > 0, 24, length, where)
    variables = {'params': sharding.init_params(policy.model, jax.random.key(0), mesh)}
    config = SamplingConfig(length, length, 8, 1.0)
    prompt = jnp.asarray(np.random.default_rng(0).integers(3, 256, (rows, 24)), jnp.int32)
    mask = jnp.ones(prompt.shape, bool)
    keys = example_keys(0, Purpose.SAMPLE, 0, jnp.arange(rows, dtype=jnp.uint32))
    generate, stream = make_generate(policy, config), make_stream(policy, config, slots)

    def whole() -> list[Completion]:
        return [
            generate(variables, *(x[first : first + slots] for x in (prompt, mask, keys)))
            for first in range(0, rows, slots)
        ]

    def in_slots() -> list[Part]:
        return list(stream(variables, prompt, mask, keys))

    expected = np.concatenate([part.tokens for part in whole()])
    parts = in_slots()
    order = np.argsort(np.concatenate([index for index, _ in parts]))
    tokens = np.concatenate([part.tokens[: len(index)] for index, part in parts])[order]
    times = pairs(whole, lambda: [part for _, part in in_slots()], count)
    blocks = np.where((expected == 1).any(-1), (expected == 1).argmax(-1) // 8 + 1, length // 8)
    most = blocks.reshape(-1, slots).max(-1).sum() * slots
    return {
        'rows': rows,
        'slots': slots,
        'length': length,
        'ends': where,
        **speeds(times),
        'ideal': float(most / blocks.sum()),
        'equal_rows': float((tokens == expected).all(-1).mean()),
        'cpu_seconds': float(np.median(times[:, 1, 1])),
    }


def shown(value: Any) -> str:
    match value:
        case (float(median), float(low), float(high)):
            return f'{median:.2f} [{low:.2f}, {high:.2f}]'
        case float():
            return f'{value:.3f}'
    return str(value)


def main(_: list[str]) -> None:
    cli.compile_cache()
    figures = (
        compare_endings(FLAGS.pairs)
        if FLAGS.endings
        else compare_samplers(FLAGS.workdir, FLAGS.problems, FLAGS.pairs)
    )
    results = []
    for row in figures:
        results.append(row)
        print(*map(shown, row.values()), flush=True)  # because the whole takes minutes
    table = Table(*results[0])
    for row in results:
        table.add_row(*map(shown, row.values()))
    Console(width=120).print(table)
    print(json.dumps({'benchmark': 'samplers', 'results': results}))


if __name__ == '__main__':
    flags.DEFINE_multi_string('workdir', [], 'A run or a policy; several may be given.')
    flags.DEFINE_multi_enum('sampler', [], list(VARIANTS), 'Only these samplers.')
    flags.DEFINE_integer('problems', 256, 'How many test problems.', lower_bound=1)
    flags.DEFINE_integer('group', 1, 'Completions of each problem.', lower_bound=1)
    flags.DEFINE_integer('pairs', 5, 'Pairs of timed runs.', lower_bound=1)
    flags.DEFINE_float('temperature', 0.0, 'Of the choice of tokens.', lower_bound=0.0)
    flags.DEFINE_bool('endings', False, 'Compare whole batches with slots, on a random model.')
    cli.run(main)
