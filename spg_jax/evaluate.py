"""Measures accuracy by the published protocol: greedy, low-confidence commitment, fixed lengths.

    python -m spg_jax.evaluate --workdir=DIR                # its best policy, on the test split
    python -m spg_jax.evaluate --workdir=DIR --data=FILE    # on a published test file
    python -m spg_jax.evaluate --config=configs/sudoku.py:llada_8b --checkpoint=DIR [--adapter=DIR]

DIR is a run of `spg_jax.train` or a policy directory. With --checkpoint it may also be a published
checkpoint. The folder --out gets completions.jsonl, which `spg_jax.score` reads, and result.json
with the figures and the card of each file of completions (docs/scoring.md). The last line of
standard output is one JSON object.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from spg_jax.assembly import assemble
from spg_jax.method import complete
from spg_jax.process import cli, distributed
from spg_jax.process.files import local_path, make_folder
from spg_jax.rl.evaluator import Evaluator, Transcript
from spg_jax.runs import policies
from spg_jax.runs.directory import CONFIG, chosen_policy, digest
from spg_jax.runs.evaluations import chosen_by, write_evaluation
from spg_jax.runs.identity import digest_path
from spg_jax.tasks.source import SPLITS

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    config, directory, adapter = chosen_policy(
        FLAGS.workdir, FLAGS.checkpoint, FLAGS.adapter, FLAGS.config
    )
    if FLAGS.samples:
        config.evaluation.samples = FLAGS.samples
    parts, mesh = assemble(config), cli.chosen_mesh(config.mesh)
    # Fail early: these two calls read no weights.
    tokenizer = policies.load_tokenizer(directory)
    policies.check_policy(directory, mesh, adapter)
    out = local_path(FLAGS.out or default_out(config.to_dict(), directory, adapter))
    check_out(out)
    cli.compile_cache()
    started = time.monotonic()
    task = parts.evaluation_task
    if FLAGS.data:
        examples = task.read_published(FLAGS.data)
    else:
        with distributed.leader_first('problems'):
            source = task.source(FLAGS.split, config.task.data_dir)
        examples = list(source)
    if distributed.is_leader():
        print(f'{len(examples)} problems of {task.name}, results in {out}', file=sys.stderr)
    with jax.set_mesh(mesh):
        policy, _, variables = policies.load_policy(directory, mesh, adapter, **parts.execution)
        evaluator = Evaluator(policy, task, tokenizer, parts.evaluation, mesh)
        transcripts: list[Transcript] = []
        report = evaluator.report(variables, examples, transcripts)
    if not distributed.is_leader():
        return
    print(f'{len(examples)} problems, {time.monotonic() - started:.0f} s', file=sys.stderr)
    table = Table(
        'length', 'steps', 'block', 'accuracy', title=f'{task.name}, {task.scorer} scorer'
    )
    for decoding in parts.evaluation.decodings:
        accuracy = report['accuracy_by_length'][str(decoding.length)]
        sizes = decoding.length, decoding.steps, decoding.block_length
        table.add_row(*map(str, sizes), f'{accuracy:.3f}')
    Console(stderr=True).print(table)
    report |= {'files': [FLAGS.data or f'{FLAGS.split} split']}
    identity: dict[str, Any] = {
        'directory': str(directory),
        'digest': policies.digest_of(directory),
    }
    if adapter:
        identity['adapter'] = {'directory': str(adapter), 'digest': digest_path(adapter)}
    card = write_evaluation(
        out, config, examples, transcripts, chosen_by(directory), report | {'policy': identity}
    )
    print(f'completions and card in {out}', file=sys.stderr)
    print(json.dumps(report | {'card': card.to_json(), 'out': str(out)}))


def default_out(settings: dict[str, Any], directory: Path, adapter: Path | None) -> str:
    """runs/evaluation-TASK-HASH, where the hash is that of the policy and of all settings."""
    asked = [str(directory.absolute()), str(adapter or ''), FLAGS.data, FLAGS.split]
    name = digest(settings | {'asked': dict(enumerate(asked))})
    return f'runs/evaluation-{settings["task"]["name"]}-{name}'


def check_out(out: Path) -> None:
    """Makes the folder for the results, or refuses it before the work starts.

    Raises:
      ValueError: the folder cannot be made, or holds a run or a policy, whose files would be lost.
    """
    if policies.is_policy(out) or (out / CONFIG).exists() or (out / 'checkpoints').exists():
        raise ValueError(
            f'--out={out} holds a run or a policy, whose files the results would replace; give '
            'another folder'
        )
    if not distributed.is_leader():
        return
    make_folder(out, 'the results are to go there; give --out, a folder that can be written')


if __name__ == '__main__':
    cli.define_policy_flags(complete)
    cli.define_distributed_flag()
    cli.define_path_flag('data', '', "A published test file; '' evaluates on --split.")
    cli.define_path_flag(
        'out', '', "The folder of the results; '' is runs/evaluation-TASK-HASH, for each policy."
    )
    flags.DEFINE_enum('split', 'test', SPLITS, 'The split of the task, without --data.')
    flags.DEFINE_integer(
        'samples',
        None,
        'k of pass@k; by default evaluation.samples of the configuration.',
        lower_bound=1,
    )
    cli.run(main)
