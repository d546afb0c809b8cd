"""Measures host memory while a published checkpoint is imported and exported; prints a table.

    python -m benchmarks.import_memory [--checkpoint=HF_DIR]

Without --checkpoint the command makes a random checkpoint of 1.6 GB in shards. It has the names,
the 32 layers and the proportions of LLaDA-8B, 5/16 of its width, and type bfloat16. One new process
reads it onto 8 virtual CPU devices and writes it again; another does the same with one device. A
CPU device keeps its arrays in host memory. The table therefore shows the peak of an import above
the size of the parameters, and the peak of an export above the memory that was held before it. In
an export the devices hold a tensor in the order of the file beside the copy on the host. An import
that needs more than twice the largest published tensor is an error.

A separate process measures anonymous resident memory (RssAnon of /proc). Pages of mapped files are
left out, because the kernel takes them back when it needs room.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from spg_jax import sharding
from spg_jax.models import weights
from spg_jax.models.llada.configuration import ARCHITECTURE, read_config
from spg_jax.models.tensor_files import Tensor, write_checkpoint
from spg_jax.process import cli

FLAGS = flags.FLAGS
LIMIT = 2.0  # largest tensors that an import may hold beside the parameters
INTERVAL = 0.001  # seconds between two measurements
SHARD_BYTES = 300 * 10**6  # size of the largest file of the random checkpoint
SMALLER_8B = dict(
    d_model=1280,
    n_heads=10,
    n_kv_heads=10,
    n_layers=32,
    mlp_hidden_size=3840,
    vocab_size=39520,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    weight_tying=False,
    scale_logits=False,
    torch_dtype='bfloat16',
    mask_token_id=39480,
    eos_token_id=39400,
    pad_token_id=39400,
)


def make_random(directory: Path) -> None:
    """Writes a random checkpoint in the published layout."""
    (directory / 'config.json').write_text(json.dumps({**ARCHITECTURE, **SMALLER_8B}))
    config, _ = read_config(directory / 'config.json')
    rng = np.random.default_rng(0)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        def values() -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

        return Tensor(shape, np.dtype(ml_dtypes.bfloat16), values)

    tensors = {name: tensor(shape) for name, shape in weights.tensor_shapes(config).items()}
    write_checkpoint(directory, tensors, SHARD_BYTES)


def anonymous_bytes(process: int) -> int | None:
    """The bytes of anonymous resident memory of a process; None once it has ended."""
    try:
        status = Path(f'/proc/{process}/status').read_text()
    except FileNotFoundError:
        return None
    kibibytes = [line.split()[1] for line in status.splitlines() if line.startswith('RssAnon')]
    return int(kibibytes[0]) * 1024 if kibibytes else None


def move(checkpoint: Path) -> None:
    """Imports and exports the checkpoint, and prints time and memory before and after each."""
    mesh = sharding.make_mesh({'fsdp': -1})
    # The compiler takes its own memory before the first mark.
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(8)))
    marks = []

    def mark() -> None:
        marks.append({'time': time.monotonic(), 'bytes': anonymous_bytes(os.getpid())})

    mark()
    _, _, params = weights.load_checkpoint(checkpoint, mesh)
    jax.block_until_ready(params)
    mark()
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as out:
        weights.save_checkpoint(Path(out), params, checkpoint)
        mark()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({'size': size, 'marks': marks}))


def watch(checkpoint: Path, devices: int) -> tuple[dict[str, Any], list[tuple[float, int]]]:
    """Runs `move` in a new process; returns its output, and (seconds, bytes) while it ran."""
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        # Otherwise the C library keeps freed memory below 32 MiB, as the tensors here are.
        'MALLOC_MMAP_THRESHOLD_': str(2**20),
    }
    command = [sys.executable, '-m', 'benchmarks.import_memory', f'--move={checkpoint}']
    samples: list[tuple[float, int]] = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:

        def sample() -> None:
            while (held := anonymous_bytes(process.pid)) is not None:
                samples.append((time.monotonic(), held))
                time.sleep(INTERVAL)

        thread = threading.Thread(target=sample)
        thread.start()
        output, _ = process.communicate()
        thread.join()
    if process.returncode:
        raise RuntimeError(f'the import onto {devices} devices ended with {process.returncode}')
    return json.loads(output.splitlines()[-1]), samples


def main(_: Sequence[str]) -> None:
    if FLAGS.move:
        move(Path(FLAGS.move))
        return
    within = True
    table = Table('devices', 'what', 'seconds', 'parameters', 'largest tensor', 'above', 'ratio')
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(FLAGS.checkpoint or temporary)
        if not FLAGS.checkpoint:
            make_random(checkpoint)
        config, _, _ = weights.check_checkpoint(checkpoint)
        itemsize = np.dtype(config.param_dtype).itemsize
        largest = itemsize * max(map(np.prod, weights.tensor_shapes(config).values()))
        for devices in (8, 1):
            output, samples = watch(checkpoint, devices)
            before, imported, exported = output['marks']
            for what, start, end, held in (
                ('import', before, imported, before['bytes'] + output['size']),
                ('export', imported, exported, imported['bytes']),
            ):
                during = [held for when, held in samples if start['time'] <= when <= end['time']]
                above = max(during) - held
                within &= what == 'export' or above <= LIMIT * largest
                table.add_row(
                    str(devices),
                    what,
                    f'{end["time"] - start["time"]:.1f}',
                    f'{output["size"] / 2**20:.0f} MiB',
                    f'{largest / 2**20:.0f} MiB',
                    f'{above / 2**20:.0f} MiB',
                    f'{above / largest:.2f}',
                )
    Console(width=100).print(table)
    if not within:
        sys.exit(f'the import held more than {LIMIT:g} x the largest tensor beside the parameters')


if __name__ == '__main__':
    cli.define_path_flag('checkpoint', '', "A published checkpoint; '' makes a random one.")
    cli.define_path_flag('move', '', 'The checkpoint to import and export in the measured process.')
    cli.run(main)
