"""A converted model against the same compute from scratch and in one jump, then SPG on each.

    python -m benchmarks.conversion [--tasks=countdown,sudoku] [--seeds=0,1,2] [--jobs=2]

For each task and seed: an autoregressive model; its conversion by blocks that rise to the whole
length and fall again; the same in one jump to the whole length; and a diffusion model from scratch.
The last three have read equally many tokens. SPG then trains each of the three by the main job's
settings. All learn from right answers only. Every model is a line of --out; accuracies are of the
test split, greedy, and the loss is that of a conversion in blocks of its last size, on validation,
in nats a token. Run the same command again to go on; what is finished is only read.
"""

import importlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from benchmarks import runs
from spg_jax.assembly import conversion_of
from spg_jax.comparison.statistics import estimate, percent
from spg_jax.process import cli
from spg_jax.process.files import write_whole
from spg_jax.runs import policies

# Updates of the autoregressive model, and of the first stage of the conversion in blocks of 1.
START, FIRST = 800, ((1, 60, 1.0), (2, 40, 1.0), (4, 40, 1.0))
WHOLE, LAST = 200, ((4, 100, 0.3),)
FLAGS = flags.FLAGS


def main(_: Sequence[str]) -> None:
    cases = [(task, int(seed)) for task in FLAGS.tasks for seed in FLAGS.seeds]
    models = runs.at_once(FLAGS.jobs, [partial(measure, *case) for case in cases])
    records = [record for of_seed in models for record in of_seed]
    out = Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, ''.join(json.dumps(record) + '\n' for record in records))
    print(table(records))


def measure(task: str, seed: int) -> list[dict[str, Any]]:
    """The figures of all models of a task and a seed."""
    folder = Path(FLAGS.workdir) / f'{task}-{seed}'
    start, scratch = folder / 'autoregressive', folder / 'scratch'
    config = importlib.import_module(f'configs.{task}').get_config()
    phases = {'converted': (*FIRST, (0, WHOLE, 1.0), *LAST)}
    jump = round(tokens_of(config, phases['converted'][:-1]) / tokens_of(config, ((0, 1, 1.0),)))
    phases['one jump'] = ((0, jump, 1.0), *LAST)
    base_steps = START + round(tokens_of(config, phases['converted']) / tokens_of_base(config))

    def run(module: str, workdir: Path, **settings: Any) -> None:
        own = {'config.base.seed': seed} | settings
        arguments = (f'--{name}={value}' for name, value in own.items())
        runs.run(
            f'spg_jax.{module}', f'--config=configs/{task}.py', f'--workdir={workdir}', *arguments
        )

    kind = {'config.base.kind': 'autoregressive'}
    run('pretrain', start, **kind, **{'config.base.stages': ((START, 1.0),)})
    run('pretrain', scratch, **{'config.base.stages': ((base_steps, 1.0),)})
    starts = {'scratch': scratch}
    for name, own in phases.items():
        starts[name] = folder / name.replace(' ', '-')
        settings = {'config.convert.phases': own, 'config.convert.validate_every': 20}
        run('convert', starts[name], **{'config.base.checkpoint': start}, **settings)
    of_start = json.loads(
        runs.run('spg_jax.evaluate', f'--workdir={start}', f'--out={folder / "evaluation"}')
    )
    here = {'task': task, 'seed': seed}
    names = ('accuracy', 'grid_accuracy')
    records = [
        here
        | {'model': 'autoregressive', 'steps': START}
        | {name: of_start[name] for name in names if name in of_start}
    ]
    for name, base in starts.items():
        settings = {'base.checkpoint': base, 'train.seed': seed, 'evaluation.samples': 1}
        result = runs.train(f'configs/{task}.py', folder / f'spg-{base.name}', settings)
        record = here | {'model': name, 'phases': phases.get(name), 'steps': base_steps}
        if name in phases:
            last = policies.policy_notes(base)['conversion']['validated'][-1]
            loss = next(value for key, value in last.items() if key.startswith('validation_loss'))
            record |= {'steps': START, 'loss': loss}
        record |= {each: result[f'base_{each}'] for each in names if each in result}
        records.append(record | {f'spg_{each}': result[each] for each in names if each in result})
    return records


def tokens_of(config: ml_collections.ConfigDict, phases: Sequence[tuple[int, int, float]]) -> int:
    """The tokens that the phases of a conversion read, complements and clean copies included."""
    settings = config.convert
    copies = 1 + settings.complementary
    return sum(
        updates * copies * (2 if block else 1) * settings.batch_size * conversion_of(config).length
        for block, updates, _ in phases
    )


def tokens_of_base(config: ml_collections.ConfigDict) -> int:
    """The tokens that a step of the base policy reads."""
    return config.base.batch_size * (config.sampling.prompt_length + config.sampling.length)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with their intervals, in per cent; the loss in nats a token."""
    lines = ['| task | model | seeds | loss | test | after SPG |', '|---' * 6 + '|']
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record['task'], record['model']), []).append(record)
    for (task, model), group in groups.items():
        losses = [record['loss'] for record in group if 'loss' in record]
        loss = f'{sum(losses) / len(losses):.3f}' if losses else '–'
        cells = (task, model, len(group), loss, *(shares(group, when) for when in ('', 'spg_')))
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def shares(group: Sequence[dict[str, Any]], when: str) -> str:
    """Accuracy, and that of whole grids where there are any."""
    names = [f'{when}accuracy', f'{when}grid_accuracy']
    shown = [
        percent(estimate([record[name] for record in group])) for name in names if name in group[0]
    ]
    return ' / '.join(shown) or '–'


if __name__ == '__main__':
    flags.DEFINE_list('tasks', ['countdown', 'sudoku'], 'The tasks.')
    flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the models and of SPG.')
    flags.DEFINE_integer('jobs', 2, 'Seeds that are at work at the same time.', lower_bound=1)
    cli.define_path_flag('workdir', 'runs/conversion', 'The folder of the runs.', saves=True)
    cli.define_path_flag('out', 'docs/results/conversion.jsonl', 'The records.', saves=True)
    cli.run(main)
