"""Checks and times this code on the accelerator that is here, in at most eight minutes.

    python -m benchmarks.on_accelerator --config=configs/gsm8k.py:llada_8b_h100 [--out=FILE.json]

The command has four parts, which --parts chooses among. Each runs in a process of its own.

- peaks: the rate of matrix products and the bandwidth of memory that the device reaches;
- attention: every implementation against exact attention in float32, and its time and memory;
- model: one denoising step of a rollout and one whole update of a model with the shapes of
  LLaDA-8B, random parameters and adapters, and their memory and time beside what `plan` says;
- tests: the numerical tests, on one accelerator, with matrix products in full precision.

On GPUs set XLA_FLAGS=--xla_gpu_enable_triton_gemm=false: with its Triton kernels XLA compiles and
times so many forms of each product that compiling takes minutes. docs/performance.md has figures.

It prints tables and writes a JSON file. It needs neither problems nor a checkpoint, and beside the
packages of JAX only absl, ml_collections, msgspec and rich, and pytest, pytest-xdist and scipy for
the tests. A part that fails does not end the others; the exit status is then 1.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# XLA takes this share of a GPU's memory, for which plans are made; its own default is less.
os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax import Array
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.method import complete
from spg_jax.models.attention import attention
from spg_jax.models.lora import COLLECTION
from spg_jax.models.policy import Variables
from spg_jax.planning import costs, memory
from spg_jax.planning.machines import CHIPS, GIB, Chip
from spg_jax.planning.programs import make_plan, planned_policy
from spg_jax.process import cli
from spg_jax.process.config_flag import define_config_flag
from spg_jax.process.files import write_whole
from spg_jax.random import Purpose, example_keys
from spg_jax.rl.collection import make_generate
from spg_jax.rl.learner import make_update
from spg_jax.rl.rollout import Rollout, empty_rollout
from spg_jax.training import optimizers
from spg_jax.training.train_state import Metrics, initial_state, shardings_of

FLAGS = flags.FLAGS
PARTS = ('peaks', 'attention', 'model', 'tests')
# Length 456 is that of the published recipe, 2012 that of its Sudoku: rows, L, N, H.
ATTENTION_SHAPES = ((24, 456, 32, 128), (6, 2012, 32, 128))
IMPLEMENTATIONS = {'gpu': ('einsum', 'folded', 'cudnn'), 'tpu': ('einsum', 'folded', 'splash')}
TESTS = ('tests/diffusion', 'tests/models', 'tests/rl', 'tests/training')  # with numerical ones
Row = dict[str, Any]


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median seconds of `repeats` runs; the caller has compiled the program before."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def peaks() -> Row:
    """What the device reaches: FLOPs per second in bfloat16, and bytes per second of a copy."""
    size = 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    doubled = jax.jit(lambda x: x + x)
    big = jnp.ones((2**30,), jnp.bfloat16)
    jax.block_until_ready((product(x, x), doubled(big)))
    return {
        'flops': 2 * size**3 / seconds(lambda: product(x, x), 10),
        'bandwidth': 2 * big.nbytes / seconds(lambda: doubled(big), 10),
    }


def exact_attention(q: Array, k: Array, v: Array, valid: Array) -> Array:
    """The result of `attention`, with float32 products that nothing rounds."""
    with jax.default_matmul_precision('highest'):
        return attention(*(x.astype(jnp.float32) for x in (q, k, v)), valid)


def measure_attention(platform: str) -> list[Row]:
    """Error, time, rate and memory of each implementation, forwards and backwards.

    The error is the largest absolute difference from exact attention, over the largest entry. The
    backward pass counts as 2.5 forward passes, as in fused kernels.
    """
    rows = []
    for B, L, N, H in ATTENTION_SHAPES:
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, weights = (jax.random.normal(key, (B, L, N, H), jnp.bfloat16) for key in keys)
        valid = jnp.arange(L)[None, :] >= 10 * jnp.arange(B)[:, None]

        def weighted(run: Callable[..., Array]) -> Callable[..., Any]:
            def total(q: Array, k: Array, v: Array) -> Array:
                return jnp.sum((run(q, k, v, valid) * weights).astype(jnp.float32))  # noqa: B023

            return jax.jit(jax.grad(total, (0, 1, 2)))

        real = valid[:, :, None, None]
        exact = jax.jit(exact_attention)(q, k, v, valid)
        exact_gradient = weighted(exact_attention)(q, k, v)
        for name in IMPLEMENTATIONS.get(platform, ('einsum', 'folded')):
            implementation = lambda *arrays, name=name: attention(*arrays, implementation=name)  # noqa: E731
            forwards, backwards = jax.jit(implementation), weighted(implementation)
            compiled = backwards.lower(q, k, v).compile()
            output, gradient = forwards(q, k, v, valid), compiled(q, k, v)
            flops = 4 * B * L * L * N * H
            took = seconds(lambda: forwards(q, k, v, valid), 20)  # noqa: B023
            took_both = seconds(lambda: compiled(q, k, v), 20)  # noqa: B023
            rows.append(
                {
                    'shape': (B, L, N, H),
                    'implementation': name,
                    'error': _error(output * real, exact * real),
                    'gradient_error': max(map(_error, gradient, exact_gradient)),
                    'forward_seconds': took,
                    'forward_flops': flops / took,
                    'gradient_seconds': took_both,
                    'gradient_flops': 3.5 * flops / took_both,
                    'gradient_bytes': compiled.memory_analysis().temp_size_in_bytes,
                }
            )
    return rows


def _error(actual: Array, expected: Array) -> float:
    difference = jnp.abs(actual.astype(jnp.float32) - expected.astype(jnp.float32)).max()
    return float(difference / jnp.abs(expected.astype(jnp.float32)).max())


def chip_of(device: jax.Device) -> Chip | None:
    """The chip in the tables of `plan` that a device is, by the name it gives itself."""
    kind = device.device_kind.lower()
    names = {'v5 lite': 'v5e', 'v5e': 'v5e', 'v5p': 'v5p', 'v6 lite': 'v6e', 'v6e': 'v6e'}
    names |= {name: name for name in ('h100', 'h200', 'a100')}
    return next((CHIPS[name] for part, name in names.items() if part in kind), None)


def random_rollout(
    rows: int, prompt_length: int, length: int, vocab_size: int, mesh: Mesh
) -> Rollout:
    """Random tokens: no row ends early, and the signs of advantages alternate."""
    rng = np.random.default_rng(0)
    ids = lambda *shape: rng.integers(0, vocab_size, shape, np.int32)  # noqa: E731
    values = {
        'prompt': ids(rows, prompt_length),
        'prompt_mask': np.ones((rows, prompt_length), bool),
        'completion': ids(rows, length),
        'scored': np.ones((rows, length), bool),
        'advantage': np.where(np.arange(rows) % 2, 0.5, -0.5).astype(np.float32),
        'example_id': np.arange(rows, dtype=np.uint32),
    }
    empty = empty_rollout(rows, prompt_length, length, mesh)
    return empty.replace(**sharding.put_batch(mesh, values))


class Model:
    """The programs of a configuration with random parameters and a random rollout."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        self.parts, self.mesh, self.updates = assemble(config), mesh, config.train.steps
        self.device = mesh.devices.flat[0]
        platform = {'gpu': 'cuda'}.get(self.device.platform, self.device.platform)
        self.plan = make_plan(config, mesh, platform)
        self.policy = planned_policy(config, platform)
        batching, length = self.parts.batching, self.parts.sampling.length
        shape = batching.rows, self.plan.prompt_length, length
        self.rollout = random_rollout(*shape, self.policy.config.vocab_size, mesh)

    def variables(self) -> Variables:
        """Random parameters and new adapters."""
        return {
            name: sharding.init_params(self.policy.model, jax.random.key(0), self.mesh, name)
            for name in ('params', COLLECTION)
        }

    def rollout_step(self, variables: Variables) -> Row:
        """The figures of one denoising step.

        There are as few steps as blocks, because a step costs the same however much it commits.
        """
        decoding = dataclasses.replace(self.parts.sampling, steps=self.parts.sampling.blocks)
        rows = self.parts.batching.rows_at_once
        batch = jax.tree.map(lambda x: x[:rows], self.rollout)
        keys = example_keys(0, Purpose.SAMPLE, 0, batch.example_id)
        arguments = variables, batch.prompt, batch.prompt_mask, keys
        program, compiling = _compile(make_generate(self.policy, decoding), arguments)
        tokens = program(*arguments).tokens
        return {
            'program': 'rollout step',
            'rows': rows,
            'seconds': seconds(lambda: program(*arguments), 1) / decoding.steps,
            'sound': bool(jnp.all(tokens != self.policy.mask_id)),
            'compile_seconds': compiling,
            **_memory(program, self.device),
            **self.planned('rollout', self.parts.sampling.steps),
        }

    def update(self, variables: Variables) -> Row:
        """The figures of one update, which reuses the memory of `variables`."""
        parts, policy = self.parts, self.policy
        optimizer = optimizers.for_rl(parts.optimizer, self.updates, parts.objective.rate)
        state = initial_state(variables, optimizer, policy, self.mesh, average=False)
        shardings = shardings_of(state)
        update = make_update(policy, parts.objective, optimizer, parts.batching, 0, shardings)
        program, compiling = _compile(update, (state, self.rollout))

        def run() -> Metrics:
            nonlocal state
            state, metrics = program(update.seed, state, self.rollout)
            return metrics

        metrics = run()
        loss, norm = (float(metrics[name][0]) for name in ('loss', 'gradient_norm'))
        return {
            'program': 'update',
            'rows': parts.batching.rows,
            'seconds': seconds(run, 1),
            'sound': math.isfinite(loss) and norm > 0,
            'compile_seconds': compiling,
            **_memory(program, self.device),
            **self.planned('update', 1),
        }

    def planned(self, name: str, steps: int) -> Row:
        """What `plan` expects of one of `steps` equal pieces of a program, on each device."""
        work, chip = costs.work(self.plan, name), chip_of(self.device)
        pieces = steps * self.mesh.size
        resident = memory.resident(self.plan.state).total
        return {
            'planned_bytes': resident + sum(memory.estimate(self.plan, name).values()),
            'planned_flops': work.flops / pieces,
            'seconds_at_peak': chip
            and max(work.flops / chip.flops, work.bytes / chip.bandwidth) / pieces,
        }


def measure_model(config: ml_collections.ConfigDict) -> list[Row]:
    """Time and memory of a step of a rollout and of an update, beside what is planned."""
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model = Model(config, mesh)
        variables = model.variables()
        rows = [model.rollout_step(variables)]
        print(rows[0], flush=True)
        return [*rows, model.update(variables)]


def _compile(function: Any, arguments: Sequence[Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - started


def _memory(program: Any, device: jax.Device) -> Row:
    """The bytes of a program by the compiler, and the most that the device has held so far."""
    sizes = program.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    peak = (device.memory_stats() or {}).get('peak_bytes_in_use', 0)
    return {'compiled_bytes': held + sizes.temp_size_in_bytes, 'peak_bytes': peak}


def run_tests(workers: int, log: Path) -> Row:
    """Runs the numerical tests; the counts of pytest's closing line, and where its output is.

    Raises:
      RuntimeError: some test failed.
    """
    # The processes share the memory of the device, which each would otherwise take for itself.
    environment = os.environ | {
        'SPG_JAX_TESTS_ON': 'accelerator',
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    }
    if shutil.which('nvidia-smi'):
        # The search for the fastest kernels would take longer than the tests, which are not timed.
        options = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_autotune_level=0'
        environment['XLA_FLAGS'] = options.strip()
    command = [sys.executable, '-m', 'pytest', '-m', 'numerical', f'--numprocesses={workers}']
    command += ['-rsfE', '--durations=15', '--continue-on-collection-errors', *TESTS]
    with log.open('w') as out:
        streams = {'stdout': out, 'stderr': subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, **streams)
        try:
            process.wait(FLAGS.test_seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then reports what it has seen
            process.wait(60)
    lines = log.read_text().splitlines()
    counts = re.findall(r'(\d+) (passed|failed|skipped|error)', lines[-1])
    result = {name: int(count) for count, name in counts} | {'log': str(log)}
    if process.returncode:
        failures = [line for line in lines if line.startswith(('FAILED', 'ERROR'))]
        raise RuntimeError('\n'.join([str(result), *failures]))
    return result


def measure(part: str) -> Any:
    """The figures of one part."""
    if part == 'tests':
        log = Path(FLAGS.out).with_suffix('.log')
        return run_tests(min(FLAGS.workers, os.cpu_count() or 1), log)
    device = jax.devices()[0]
    figures = {
        'peaks': peaks,
        'attention': lambda: measure_attention(device.platform),
        'model': lambda: measure_model(FLAGS.config),
    }[part]()
    return {
        'device': device.device_kind,
        'jax': jax.__version__,
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'figures': figures,
    }


def in_processes(parts: Sequence[str], out: Path) -> Row:
    """The figures of several parts, or the error of a part that failed.

    A part gets a process, because a process keeps the memory that it took of a device.
    """
    result: Row = {}
    for part in parts:
        path = out.with_suffix(f'.{part}.json')
        path.unlink(missing_ok=True)
        # Of a flag that is given twice, the last value counts.
        arguments = [*sys.argv[1:], f'--parts={part}', f'--out={path}']
        started = time.perf_counter()
        command = [sys.executable, '-m', __spec__.name, *arguments]
        process = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        took = time.perf_counter() - started
        print(f'{part}: {took:.0f} s, status {process.returncode}', flush=True)
        if process.returncode:
            print(process.stderr[-3000:], flush=True)
            result[part] = {'error': process.stderr[-20_000:]}
        else:
            result[part] = json.loads(path.read_text())[part]
            path.unlink()
        write_whole(out, json.dumps(result, indent=1))
    return result


def show(result: Row) -> None:
    """Prints what was measured as tables."""
    console = Console(width=180)
    for name, figures in result.items():
        rows = figures.get('figures', figures)
        if not isinstance(rows, list):
            console.print(f'{name}: {"failed" if "error" in rows else figures}')
            continue
        table = Table(*rows[0], title=f'{name} on {figures["device"]}')
        for row in rows:
            table.add_row(*(_shown(key, row.get(key, '')) for key in rows[0]))
        console.print(table)


def _shown(key: str, value: Any) -> str:
    if key.endswith('bytes'):
        return f'{value / GIB:.2f} GiB'
    if key.endswith('flops'):
        return f'{value / 1e12:.1f} T'
    return f'{value:.3g}' if isinstance(value, float) else str(value)


def main(_: Sequence[str]) -> None:
    unknown = sorted(set(FLAGS.parts) - set(PARTS))
    if unknown:
        raise ValueError(f'--parts has {unknown[0]!r}; use some of {", ".join(PARTS)}')
    out = Path(FLAGS.out)
    if len(FLAGS.parts) == 1:
        result = {FLAGS.parts[0]: measure(FLAGS.parts[0])}
        write_whole(out, json.dumps(result, indent=1))
    else:
        result = in_processes(FLAGS.parts, out)
    show(result)
    print(f'written to {out}')
    if any('error' in figures for figures in result.values()):
        sys.exit(1)


if __name__ == '__main__':
    define_config_flag(complete)
    flags.DEFINE_list('parts', list(PARTS), f'What is measured: {", ".join(PARTS)}.')
    flags.DEFINE_integer('workers', 12, 'Processes among which the tests are shared out.')
    flags.DEFINE_float('test_seconds', 240, 'After that, the tests are interrupted.')
    cli.define_path_flag('out', 'on_accelerator.json', 'The JSON file with every figure.')
    cli.run(main)
