"""Accuracy of a base policy before and after editing, without reinforcement learning.

    python -m benchmarks.editing [--folder=runs/editing] [--problems=256]

The policy is a small one for Sudoku, which is trained on masked answers and on answers to correct
(`base.edit_weight`) unless the folder has it. The command prints one table, on validation problems.
"""

import dataclasses
import time
from pathlib import Path

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

from configs import sudoku
from spg_jax import pretrain, sharding
from spg_jax.assembly import assemble
from spg_jax.process.interruption import Interruption
from spg_jax.rl.evaluator import Evaluator
from spg_jax.runs import policies

FLAGS = flags.FLAGS
SAMPLERS = (
    {'sampler': 'autoedit', 'edit_rounds': 1},
    {'sampler': 'autoedit', 'edit_rounds': 3},
    {'sampler': 'autoedit', 'edit_rounds': 3, 'keep_threshold': 0.2},
    {'sampler': 'llada21', 'threshold': 0.95, 'edit_threshold': 0.9},
    {'sampler': 'llada21', 'threshold': 0.5, 'edit_threshold': 0.5},
)


def main(_: list[str]) -> None:
    config = sudoku.get_config('small')
    config.base.update(stages=((500, 1.0), (70, 0.15)), batch_size=64, edit_weight=1.0)
    config.base.muon_rate = 0.0  # as when the table of docs/sampling.md was recorded
    directory, mesh = Path(FLAGS.folder) / 'base', sharding.make_mesh(config.mesh)
    started = time.process_time()
    with jax.set_mesh(mesh), Interruption() as interruption:
        if not pretrain.pretrain(config, directory, mesh, interruption):
            return
        print(f'base policy after {time.process_time() - started:.0f} CPU seconds', flush=True)
        parts = assemble(config)
        policy, tokenizer, variables = policies.load_policy(directory, mesh, **parts.execution)
        problems = list(parts.task.source('validation', config.task.data_dir))[: FLAGS.problems]
        table = Table(
            'T', 'sampler', 'draft', 'answer', 'grids', 'wrong to right', 'right to wrong', 'edited'
        )
        for temperature in (0.0, 1.0):
            for options in SAMPLERS:
                decoding = dataclasses.replace(
                    parts.evaluation.headline, temperature=temperature, **options
                )
                evaluation = dataclasses.replace(parts.evaluation, decodings=(decoding,))
                evaluator = Evaluator(policy, parts.evaluation_task, tokenizer, evaluation, mesh)
                figures = evaluator.validate(variables, problems)
                table.add_row(
                    f'{temperature:g}',
                    ', '.join(map(str, options.values())),
                    f'{figures["draft_accuracy"]:.3f}',
                    f'{figures["accuracy"]:.3f}',
                    f'{figures["draft_solved"] / len(problems):.3f} -> '
                    f'{figures["grid_accuracy"]:.3f}',
                    str(figures['wrong_to_right']),
                    str(figures['right_to_wrong']),
                    f'{figures["edited"]:.1%}',
                )
    Console().print(table)


if __name__ == '__main__':
    flags.DEFINE_string('folder', 'runs/editing', 'The folder of the policy.')
    flags.DEFINE_integer('problems', 256, 'Validation problems.', lower_bound=1)
    app.run(main)
