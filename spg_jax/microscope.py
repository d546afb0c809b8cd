"""The estimator microscope: what every method estimates, against the truth, on toys.

    python -m spg_jax.microscope --out=DIR                      # every objective, a few minutes
    python -m spg_jax.microscope --objectives=spg,my_package.mine --out=DIR
    python -m spg_jax.microscope --smoke                        # does it run? seconds, no figures

The toys are small enough to enumerate all that decoding may do (`spg_jax.rl.toys`). Their policy
gradient is therefore known exactly, for the very decoder that made the samples. Tables on standard
output, `microscope.jsonl` and `microscope.png` in DIR say how near to it each method points.
docs/microscope.md explains them in plain words. The last line printed is one JSON object.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich.console import Console
from rich.table import Table

from spg_jax.assembly import Parts, assemble
from spg_jax.config import default_config
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.method import names, set_objective, unknown
from spg_jax.presets import on_a_laptop
from spg_jax.process import cli
from spg_jax.process.files import make_folder
from spg_jax.process.progress import track
from spg_jax.rl import toy_bounds, toy_directions, toys
from spg_jax.rl.objectives import REGISTRY
from spg_jax.rl.toy_directions import BUDGET, Direction, Sample

FLAGS = flags.FLAGS
REWARDS = ('answer', 'cells')
GROUP_SIZE, TURNS = 8, 2
# Toys decode four tokens: numbers of states and draws that were made for long completions shrink.
SMALL: Mapping[str, Mapping[str, Any]] = {
    'agrpo': {'states': 4},
    'bgpo': {'draws': 4},
    'd2': {'segments': 4},
    'ebpo': {'draws': 4},
    'tracerl': {'shrink': 1},
    'vrpo': {'draws': 4},
}


class Decoder(NamedTuple):
    """How completions are sampled."""

    name: str
    commit: str = 'low_confidence'
    block_length: int = 2
    steps: int = toys.LENGTH
    temperature: float = 1.0


class Subject(NamedTuple):
    """A method under the microscope, with settings GROUP.KEY that differ from the usual ones."""

    section: str
    name: str
    objective: str
    settings: Mapping[str, Any]
    decoder: Decoder


CONFIDENCE = Decoder('confidence, blocks of 2')
LEFT_TO_RIGHT = Decoder('left to right', commit='left_to_right')
DECODERS = (
    CONFIDENCE,
    Decoder('confidence, T = 0.5', temperature=0.5),
    Decoder('confidence, no blocks', block_length=4),
    Decoder('confidence, two a step', steps=2),
    Decoder('random order, no blocks', commit='random', block_length=4),
)
# Methods that stand for their kind in the table of decoders.
SHOWN = ('spg', 'd1', 'tracerl')
MASKS: Mapping[str, Mapping[str, Any]] = {
    'block': {},
    'uniform': {'corruption.kind': 'uniform'},
    'informed': {'corruption.informed': True},
}


def define_flags() -> None:
    """Defines the flags of this command; a mere import of this module defines none."""
    cli.define_path_flag('out', 'runs/microscope', 'Directory of the table and the picture.')
    flags.DEFINE_list(
        'objectives',
        [],
        'Objectives to measure, names or dotted paths; by default all, and SPG '
        'with other settings.',
    )
    flags.DEFINE_enum('reward', 'answer', REWARDS, 'Right or wrong, or the share of cells right.')
    flags.DEFINE_integer('toys', 3, 'Toys with different languages.', lower_bound=1)
    flags.DEFINE_integer('updates', 256, 'Updates of each toy and method.', lower_bound=16)
    flags.DEFINE_bool('smoke', False, 'Measure one objective on one toy, to see that it runs.')


def subjects(objectives: list[str]) -> Iterator[Subject]:
    """What is measured: each objective, and with all of them SPG with other settings and decoders.

    Args:
      objectives: names or dotted paths; empty for all.
    """
    # Enumerating the law of edits is left to tests.
    for name in objectives or [name for name in REGISTRY if name != 'autoedit']:
        yield Subject('methods', name, name, {}, CONFIDENCE)
    if not objectives:
        yield from variants()
        for decoder in DECODERS[1:]:
            for name in SHOWN:
                yield Subject('decoders', name, name, {}, decoder)
            yield Subject('decoders', 'spg, uniform ELBO', 'spg', UNIFORM_ELBO, decoder)
        yield Subject('decoders', 'spg, uniform ELBO', 'spg', UNIFORM_ELBO, CONFIDENCE)


UNIFORM_ELBO = {'corruption.kind': 'uniform', 'spg.negative': 'elbo'}


def variants() -> Iterator[Subject]:
    """SPG with other settings: numbers of draws under each kind of mask, then one at a time."""
    for masks, settings in MASKS.items():
        for draws in toy_bounds.DRAWS:
            name = f'mixture, {masks} masks, M={draws}'
            yield Subject('draws', name, 'spg', {**settings, 'corruption.draws': draws}, CONFIDENCE)
    for name, settings in {
        'none': {'spg.negative': 'none'},
        'ELBO': {'spg.negative': 'elbo'},
        'EUBO': {'spg.negative': 'eubo'},
        'EUBO, centred': {'spg.negative': 'eubo', 'spg.baseline': 'each'},
        'mixture, centred': {'spg.baseline': 'each'},
        'mixture, omega 0.25': {'spg.omega': 0.25},
        'mixture, omega 0.75': {'spg.omega': 0.75},
        'mixture, beta 1': {'spg.beta': 1.0},
        'mixture, beta 4': {'spg.beta': 4.0},
        'mixture, strict bound': {'spg.bound': 'strict'},
        'mixture, block estimator': {'spg.estimator': 'block'},
        'ELBO, block estimator': {'spg.estimator': 'block', 'spg.negative': 'elbo'},
        'ELBO, uniform masks': UNIFORM_ELBO,
        'none, uniform masks': {'corruption.kind': 'uniform', 'spg.negative': 'none'},
    }.items():
        yield Subject('settings', name, 'spg', settings, CONFIDENCE)


def parts_of(subject: Subject) -> Parts:
    """The parts of a run of the method on a toy, by the door that training takes.

    Raises:
      ValueError: the method or a setting is not known, or does not work with this decoder.
    """
    config = default_config()
    decoder = subject.decoder
    on_a_laptop(config, length=toys.LENGTH, block_length=decoder.block_length)
    set_objective(config, subject.objective)
    rows = toys.PROMPTS * GROUP_SIZE
    config.rl.update(
        prompts=toys.PROMPTS, group_size=GROUP_SIZE, microbatch=rows, inner_updates=TURNS
    )
    config.corruption.update(draws=2, prompt_rate=0.0)
    config.sampling.update(
        commit=decoder.commit, temperature=decoder.temperature, steps=decoder.steps
    )
    group = subject.objective
    settings = {f'{group}.{key}': value for key, value in SMALL.get(group, {}).items()}
    for key, value in {**settings, **subject.settings}.items():
        if key not in names(config):
            raise ValueError(unknown(key, config))
        group, _, leaf = key.partition('.')
        config[group][leaf] = value
    return assemble(config)


def with_decoder(subject: Subject) -> tuple[Subject, Parts]:
    """The subject with a decoder that its method works with, and its parts.

    Raises:
      ValueError: the method works with none of them; the message is that of the first.
    """
    try:
        return subject, parts_of(subject)
    except ValueError as error:
        other = subject._replace(decoder=LEFT_TO_RIGHT)
        try:
            return other, parts_of(other)
        except ValueError:
            raise error from None


def main(_: list[str]) -> None:
    started, processor = time.monotonic(), time.process_time()
    cli.compile_cache()
    out = Path(FLAGS.out)
    objectives = FLAGS.objectives or (['spg'] if FLAGS.smoke else [])
    chosen = [with_decoder(subject) for subject in subjects(objectives)]
    make_folder(out, 'give a folder that can be written as --out')
    count, updates, steps = FLAGS.toys, FLAGS.updates, toys.TRAINING_STEPS
    if FLAGS.smoke:
        count, updates, steps = 1, 16, 20
    say(f'{len(chosen)} directions on {count} toys; results in {out}')
    known = toys.make_toys(range(count), FLAGS.reward, steps)
    records = []
    if not FLAGS.smoke:
        decoding = decoding_of(chosen[0][1])
        records += [
            {'section': 'bounds', **row._asdict()} for row in toy_bounds.measure(known, decoding)
        ]
        records += [
            {'section': 'spreads', **row._asdict()} for row in toy_bounds.spreads(known, decoding)
        ]
        say(f'bounds measured, {time.monotonic() - started:.0f} s')
    records += directions(chosen, known, updates)
    with (out / 'microscope.jsonl').open('w', encoding='utf-8') as file:
        file.writelines(json.dumps(json_of(record)) + '\n' for record in records)
    show(records)
    say(f'records   {out}/microscope.jsonl')
    if not FLAGS.smoke:
        draw(records, out / 'microscope.png')
        say(f'picture   {out}/microscope.png')
    result = {
        'out': str(out),
        'reward': FLAGS.reward,
        'toys': count,
        'updates': updates,
        'seconds': round(time.monotonic() - started, 1),
        'processor_seconds': round(time.process_time() - processor, 1),
    }
    print(json.dumps(result), flush=True)


def decoding_of(chosen: Parts, others: Iterable[Parts] = ()) -> SamplingConfig:
    """How the rollouts of a method are decoded, with all records that it or others ask for."""
    names = {name for parts in (chosen, *others) for name in parts.sampling.records}
    return dataclasses.replace(chosen.sampling, records=tuple(sorted(names)))


def directions(
    chosen: list[tuple[Subject, Parts]], known: list[toys.Toy], updates: int
) -> list[dict[str, Any]]:
    """The records of all update directions; methods of one decoder share its samples."""
    policy = toys.as_table(toys.network())
    samples: dict[Decoder, list[Sample]] = {}
    records = []
    for subject, parts in chosen:
        decoder = subject.decoder
        if decoder in samples:
            continue
        decoding = decoding_of(parts, (other for _, other in chosen))
        samples[decoder] = toy_directions.make_samples(known, decoding, parts.batching, updates)
        exact = toy_directions.of_exact_likelihood(samples[decoder])
        section = 'methods' if decoder in (CONFIDENCE, LEFT_TO_RIGHT) else 'decoders'
        records.append(record_of(section, 'exact likelihood', decoder, exact))
        say(f'samples of {decoder.name}')

    def look(pair: tuple[Subject, Parts]) -> dict[str, Any]:
        subject, parts = pair
        direction = toy_directions.measure(
            policy, parts.objective, parts.batching, samples[subject.decoder]
        )
        return record_of(subject.section, subject.name, subject.decoder, direction)

    # While one thread waits for the compiler, the other one traces or computes.
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(look, chosen)
        for _ in track(range(len(chosen)), 'directions', lambda: str(records[-1]['name'])):
            records.append(next(found))
    return records


def record_of(section: str, name: str, decoder: Decoder, direction: Direction) -> dict[str, Any]:
    return {'section': section, 'name': name, 'decoder': decoder.name, **direction._asdict()}


def json_of(record: dict[str, Any]) -> dict[str, Any]:
    """The record with null for NaN, which JSON does not have."""
    return {key: None if value != value else value for key, value in record.items()}


def say(line: str) -> None:
    """One line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


# --- tables and picture ---------------------------------------------------------------------------

TITLES = {
    'methods': 'every method: cosine of its updates with the true policy gradient',
    'draws': 'SPG: masks and numbers of draws M',
    'settings': 'SPG, M = 2, block masks unless said otherwise',
    'decoders': 'other decoders, each against its own true gradient',
}


def show(records: list[dict[str, Any]]) -> None:
    """Prints the tables."""
    console = Console(width=110)
    bounds = [record for record in records if record['section'] == 'bounds']
    if bounds:
        table = Table(
            *('estimate', 'masks', 'nats', '- random', '- blocks', '- decoder'),
            *('cos random', 'cos blocks', 'cos decoder', 'drift', 'apart'),
            title='likelihoods without sampling noise, against exact ones',
        )
        for record in bounds:
            _, name, masks, *figures = record.values()
            table.add_row(name, masks, *(f'{figure:.3f}' for figure in figures))
        console.print(table)
    for section, title in TITLES.items():
        rows = [record for record in records if record['section'] == section]
        if not rows:
            continue
        if section == 'methods':
            rows = sorted(rows, key=lambda record: -record['budget'])
        table = Table(
            *('method', 'decoder', 'mean', '+-', 'one update', f'at {BUDGET} passes'),
            *('endless draws', 'passes'),
            title=title,
        )
        for record in rows:
            _, name, decoder, *figures = record.values()
            table.add_row(
                name, decoder, *(f'{figure:.3f}' for figure in figures[:-1]), f'{figures[-1]:g}'
            )
        console.print(table)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draws the picture of the records."""
    # Pyplot would ask for the backend of a screen; a figure alone draws into files.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11), layout='constrained')
    axes = figure.subplots(2, 2)
    _draw_methods(axes[0, 0], [r for r in records if r['section'] == 'methods'])
    _draw_draws(axes[0, 1], [r for r in records if r['section'] == 'draws'])
    _draw_spreads(axes[1, 0], [r for r in records if r['section'] == 'spreads'])
    _draw_bounds(axes[1, 1], [r for r in records if r['section'] == 'bounds'])
    figure.savefig(path, dpi=90)


def _draw_methods(axis: Any, records: list[dict[str, Any]]) -> None:
    records = sorted(records, key=lambda record: record['budget'])
    labels = [
        record['name'] + (', left to right' * (record['decoder'] == LEFT_TO_RIGHT.name))
        for record in records
    ]
    axis.barh(labels, [r['cosine'] for r in records], color='0.85', label='mean of all updates')
    axis.barh(
        labels, [r['budget'] for r in records], height=0.5, label=f'update of {BUDGET} passes'
    )
    axis.set(title='cosine with the true policy gradient', xlim=(0, 1.02))
    axis.legend(fontsize=8, loc='lower right')


def _draw_draws(axis: Any, records: list[dict[str, Any]]) -> None:
    for color, masks in enumerate(MASKS):
        rows = [r for r in records if f'{masks} masks' in r['name']]
        if not rows:
            continue
        draws = [r['passes'] for r in rows]
        axis.plot(draws, [r['budget'] for r in rows], 'o-', color=f'C{color}', label=masks)
        axis.plot(draws, [r['cosine'] for r in rows], '--', color=f'C{color}', alpha=0.6)
        axis.plot(draws, [r['single'] for r in rows], ':', color=f'C{color}')
    axis.set_xscale('log', base=2)
    axis.set(
        title=f'SPG mixture: mean (dashed), {BUDGET} passes (solid), one update (dotted)',
        xlabel='draws M',
        ylabel='cosine with the true policy gradient',
        ylim=(0, 1),
    )
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)
    if records:
        axis.legend(fontsize=8)


def _draw_spreads(axis: Any, records: list[dict[str, Any]]) -> None:
    for color, name in enumerate(dict.fromkeys(r['name'] for r in records)):
        for style, masks in (('-', 'uniform'), ('--', 'block')):
            rows = [r for r in records if r['name'] == name and r['masks'] == masks]
            axis.errorbar(
                [r['draws'] for r in rows],
                [r['bias'] for r in rows],
                fmt=f'{style}o',
                color=f'C{color}',
                label=f'{name}, {masks}',
                markersize=3,
            )
    axis.axhline(0, color='k', lw=0.8)
    axis.set_xscale('log', base=2)
    axis.set(title='bias of a bound by its number of draws', xlabel='draws M', ylabel='nats')
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)


def _draw_bounds(axis: Any, records: list[dict[str, Any]]) -> None:
    records = [r for r in records if r['name'] != 'log p' and 'd=0' not in r['masks'].split()][::-1]
    labels = [f'{r["name"]}, {r["masks"]}' for r in records]
    axis.barh(labels, [r['over_decoder'] for r in records], color='C2')
    axis.axvline(0, color='k', lw=0.8)
    axis.tick_params(axis='y', labelsize=7)
    axis.set(title='bound minus log-probability under the decoder, nats')


if __name__ == '__main__':
    define_flags()
    cli.run(main)
