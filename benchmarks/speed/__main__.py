"""Measures speed and memory, as one table, within five minutes on two idle cores.

    python -m benchmarks.speed [--presets=small,medium] [--only=rollout,update] [--out=DIR]
    python -m benchmarks.speed --against=REV [--pairs=5]

The first command measures rollout, update and pre-training step of each preset, the start of the
main job, and how time and memory grow. The share of the peak is that of the fastest product of
float32 matrices right before and after a call, as median, least and most over the calls; FLOPs are
counted from shapes, those of attention included. DIR gets speed.json, one line that holds
everything, and speed.png.

The second command compares the checkout with another commit: processes of both take turns, and each
pair gives a ratio. It prints medians and the smallest and largest ratio. Without --presets and
--only it compares rollout and update of the small preset.
"""

import json
import resource
import sys
import tempfile
from pathlib import Path

from absl import flags

from benchmarks.speed import growth, pairs, programs, report, start
from benchmarks.speed.machine import measure_machine
from spg_jax.process import cli
from spg_jax.process.files import write_whole

FLAGS = flags.FLAGS
ROOT = Path(__file__).parents[2]
PARTS = ('rollout', 'update', 'pretraining', 'growth', 'start')
BUDGET = 10.0  # seconds that calls of one program may take together, as far as they are short


def main(_: list[str]) -> None:
    presets, only = FLAGS.presets, FLAGS.only
    for name, values, allowed in (
        ('presets', presets, programs.PRESETS),
        ('only', only, PARTS),
    ):
        for value in values:
            if value not in allowed:
                raise ValueError(f'--{name} has {value!r}; use some of {", ".join(allowed)}')
    out = Path(FLAGS.out)
    if FLAGS.against:
        arguments = [
            f'--presets={",".join(presets or ["small"])}',
            f'--only={",".join(only or ["rollout", "update"])}',
        ]
        with tempfile.TemporaryDirectory() as folder:
            rows = pairs.compare(ROOT, FLAGS.against, FLAGS.pairs, arguments, Path(folder))
        report.print_pairs(rows, FLAGS.against)
        _save(out, {'protocol': pairs.PROTOCOL, 'against': FLAGS.against, 'pairs': rows})
        return
    cli.compile_cache()
    measured = measure(presets or list(programs.PRESETS), only or list(PARTS))
    if FLAGS.json:
        print(json.dumps(measured))
        return
    report.print_report(measured)
    _save(out, measured)


def measure(presets: list[str], only: list[str]) -> pairs.Report:
    """Everything that the first command measures, as JSON values."""
    machine, rows = measure_machine(), []
    for preset in presets:
        print(f'{preset} …', file=sys.stderr, flush=True)
        rows += programs.measure_preset(preset, only, BUDGET)
    print('growth and start …', file=sys.stderr, flush=True)
    axes = growth.AXES if 'growth' in only else ()
    grown = [growth.measure_growth(axis) for axis in axes]
    if 'start' in only:
        with tempfile.TemporaryDirectory() as folder:
            rows += start.measure_start(ROOT, Path(folder))
    again = measure_machine()  # Other work on the machine may have disturbed the first time.
    for name in ('peak_gflops', 'bandwidth_gb'):
        machine[name] = max(machine[name], again[name])
    unit = 1 if sys.platform == 'darwin' else 1024
    return {
        'protocol': pairs.PROTOCOL,
        'machine': machine,
        'rows': rows,
        'growth': grown,
        'peak_bytes': unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _save(folder: Path, content: pairs.Report) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / 'speed.json', json.dumps(content) + '\n')
    report.draw(content, folder / 'speed.png')


if __name__ == '__main__':
    flags.DEFINE_list('presets', [], 'small, medium, long; by default all.')
    flags.DEFINE_list('only', [], f'Parts to measure: {", ".join(PARTS)}; by default all.')
    flags.DEFINE_bool('json', False, 'Print one line of JSON and write no files.')
    flags.DEFINE_string('against', '', 'A commit to compare the checkout with.')
    flags.DEFINE_integer('pairs', 5, 'Processes of each commit.', lower_bound=1)
    cli.define_path_flag('out', 'runs/speed', 'The folder of speed.json and speed.png.', saves=True)
    cli.run(main)
