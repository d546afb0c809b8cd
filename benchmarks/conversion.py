"""A converted model against the same compute from scratch and in one jump, then SPG on each.

    python -m benchmarks.conversion [--tasks=countdown,sudoku] [--seeds=0,1,2] [--jobs=2]
    python -m benchmarks.conversion --only_draw    # table and figure of --out, without a run

For each task and seed: an autoregressive model; its conversion by blocks that rise to the whole
length and fall again; the same with the confidence-aware parallel (CAP) loss, and in one jump to
the whole length; and a diffusion model from scratch. All but the first have read equally many
tokens. SPG then trains the diffusion models, except that with the CAP loss, by the main job's
settings. All learn from right answers only. Every model is a line of --out; accuracies are of the
test split, greedy, and the loss is that of a conversion in blocks of its last size, on validation,
in nats a token. Tokens a pass are those that the threshold sampler commits where a probability
passes 0.9, one a pass at least, with the share of problems that it solves. --figure shows the
losses over the phases. Run the same command again to go on; what is finished is only read.
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
from spg_jax.runs.making import training_of
from spg_jax.runs.metrics import read_rows

# Updates of the autoregressive model, and of the first stage of the conversion in blocks of 1.
START, FIRST = 800, ((1, 60, 1.0), (2, 40, 1.0), (4, 40, 1.0))
WHOLE, LAST = 200, ((4, 100, 0.3),)
THRESHOLD = 'threshold 0.9'  # of benchmarks.samplers
BELOW: dict[str, Any] = {'ha': 'center', 'va': 'top', 'fontsize': 7, 'color': '0.4'}
CAP = 2.0  # the weight that LLaDA2.0 recommends
CONVERTED, WITH_CAP, JUMP = 'converted', 'converted, CAP', 'one jump'
# Every model is trained by AdamW, as conversions are.
ADAMW = {'base.muon_rate': 0.0, 'base.batch_size': 128}
ACCURACIES = ('accuracy', 'grid_accuracy')
FLAGS = flags.FLAGS


def main(_: Sequence[str]) -> None:
    out = Path(FLAGS.out)
    if not FLAGS.only_draw:
        cases = [(task, int(seed)) for task in FLAGS.tasks for seed in FLAGS.seeds]
        models = runs.at_once(FLAGS.jobs, [partial(measure, *case) for case in cases])
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record) + '\n' for of_seed in models for record in of_seed]
        write_whole(out, ''.join(lines))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    draw(records, Path(FLAGS.figure))
    print(table(records))


def measure(task: str, seed: int) -> list[dict[str, Any]]:
    """The figures of all models of a task and a seed."""
    folder = Path(FLAGS.workdir) / f'{task}-{seed}'
    start, scratch = folder / 'autoregressive', folder / 'scratch'
    file = f'configs/{task}.py'
    config = importlib.import_module(f'configs.{task}').get_config()
    steps = (*FIRST, (0, WHOLE, 1.0), *LAST)
    jump = round(tokens_of(config, steps[:-1]) / tokens_of(config, ((0, 1, 1.0),)))
    phases = {CONVERTED: steps, WITH_CAP: steps, JUMP: ((0, jump, 1.0), *LAST)}
    base_steps = START + round(tokens_of(config, steps) / tokens_of_base(config))

    def pretrain(directory: Path, updates: int, kind: str) -> None:
        stages = ((updates, 1.0),)
        settings = ADAMW | {'base.kind': kind, 'base.seed': seed, 'base.stages': stages}
        runs.make_policy('pretrain', file, directory, settings)

    pretrain(start, START, 'autoregressive')
    pretrain(scratch, base_steps, 'diffusion')
    here = {'task': task, 'seed': seed}
    records = [here | {'model': 'autoregressive', 'steps': START} | evaluated(start)]
    of_scratch = here | {'model': 'scratch', 'steps': base_steps}
    records.append(of_scratch | in_parallel(scratch) | after_spg(file, scratch, seed))
    for name, own in phases.items():
        directory = folder / name.replace(', ', '-').replace(' ', '-')
        settings = ADAMW | {'base.checkpoint': start, 'base.seed': seed, 'convert.phases': own}
        settings |= {'convert.validate_every': 20, 'convert.cap': CAP * (name == WITH_CAP)}
        runs.make_policy('convert', file, directory, settings)
        record = here | {'model': name, 'phases': own, 'steps': START} | losses_of(directory)
        record |= in_parallel(directory)
        cap = name == WITH_CAP
        record |= evaluated(directory) if cap else after_spg(file, directory, seed)
        records.append(record)
    return records


def losses_of(directory: Path) -> dict[str, Any]:
    """The last loss of a conversion on validation, and all of them as (update, block, loss)."""
    curve = [
        (row['step'], row['block'], loss)
        for row in read_rows(training_of(directory) / 'metrics.jsonl')
        for name, loss in row.items()
        if name.startswith('validation_loss')
    ]
    return {'loss': curve[-1][-1], 'curve': curve}


def evaluated(directory: Path) -> dict[str, Any]:
    """The accuracies of a policy."""
    out = directory.with_name(f'evaluation-{directory.name}')
    if not (out / 'result.json').is_file():
        runs.run('spg_jax.evaluate', f'--workdir={directory}', f'--out={out}')
    return _accuracies(json.loads((out / 'result.json').read_text()), '')


def in_parallel(directory: Path) -> dict[str, Any]:
    """The share that is solved and the tokens a pass where a threshold decides how many."""
    path = directory.with_name(f'parallel-{directory.name}.json')
    if not path.is_file():
        arguments = (f'--workdir={directory}', f'--sampler={THRESHOLD}', '--pairs=1')
        write_whole(path, runs.run('benchmarks.samplers', *arguments).splitlines()[-1])
    of_threshold = json.loads(path.read_text())['results'][-1]
    return {
        'parallel_accuracy': of_threshold['accuracy'],
        'tokens_per_pass': of_threshold['tokens_per_pass'],
    }


def after_spg(file: str, base: Path, seed: int) -> dict[str, Any]:
    """The accuracies of a base policy and of the main job's result from it."""
    settings = ADAMW | {'base.checkpoint': base, 'train.seed': seed, 'evaluation.samples': 1}
    result = runs.train(file, base.with_name(f'spg-{base.name}'), settings)
    return _accuracies(result, '', 'base_') | _accuracies(result, 'spg_')


def _accuracies(result: dict[str, Any], to: str, of: str = '') -> dict[str, Any]:
    return {to + name: result[of + name] for name in ACCURACIES if of + name in result}


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
    return ADAMW['base.batch_size'] * (config.sampling.prompt_length + config.sampling.length)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the losses of each conversion over its phases, a line a seed, and a panel a task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(record['task'] for record in records))
    figure = Figure(figsize=(5 * len(tasks), 3.6), layout='constrained')
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        of_task = [record for record in records if record['task'] == task]
        for colour, name in enumerate((CONVERTED, WITH_CAP, JUMP)):
            label = name
            for record in of_task:
                if record['model'] == name:
                    points = [(update, loss) for update, _, loss in record['curve']]
                    axis.plot(*zip(*points, strict=True), color=f'C{colour}', lw=1.2, label=label)
                    label = None
        steps = next(record['phases'] for record in of_task if record['model'] == CONVERTED)
        end = 0
        for block, updates, _ in steps:
            axis.axvline(end, color='0.8', lw=0.8, zorder=0)
            words = str(block) if block else 'whole length'
            place = (end + updates / 2, 0.97)
            axis.text(*place, words, transform=axis.get_xaxis_transform(), **BELOW)
            end += updates
        axis.set(
            title=task.capitalize(), xlabel='updates (above: size of the blocks)', yscale='log'
        )
        axis.set_ylabel('loss on validation, nats a token')
        axis.legend(fontsize=8, loc='center right')
    figure.savefig(path, dpi=110)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with their intervals, in per cent; the loss in nats a token."""
    heads = ('task', 'model', 'seeds', 'loss', 'test', 'solved with a threshold', 'tokens a pass')
    lines = [f'| {" | ".join(heads)} | after SPG |', '|---' * (len(heads) + 1) + '|']
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record['task'], record['model']), []).append(record)
    for (task, model), group in groups.items():
        figures = (mean_of(group, 'loss', 3), shares(group, ''), shares(group, 'parallel_'))
        figures += (mean_of(group, 'tokens_per_pass', 2), shares(group, 'spg_'))
        lines.append(f'| {" | ".join((task, model, str(len(group)), *figures))} |')
    return '\n'.join(lines)


def mean_of(group: Sequence[dict[str, Any]], name: str, digits: int) -> str:
    """The mean of a figure with its interval, or a dash where it was not measured."""
    values = [record[name] for record in group if name in record]
    if not values:
        return '–'
    mean = estimate(values)
    half = '' if mean.half is None else f' ± {mean.half:.{digits}f}'
    return f'{mean.mean:.{digits}f}{half}'


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
    cli.define_path_flag('figure', 'docs/conversion.png', 'The curves.', saves=True)
    flags.DEFINE_bool('only_draw', False, 'Read --out instead of writing it.')
    cli.run(main)
