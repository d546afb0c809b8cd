"""Where each treatment of worse completions pays: SPG's signs on toys, one axis at a time.

    python -m benchmarks.regime [--out=runs/regime] [--updates=300]

Toys (spg_jax/rl/toys.py) are trained by the real sampler, masks, losses and learner, from a centre:
15 % of completions right, groups of 8, block masks, M = 2, temperature 1, one token a step by
confidence in blocks of two, 2 updates a rollout. One setting at a time is moved away from it. At
every point each arm has the best of the same learning rates, by the mean value at the end on toys
that are not measured. A value is the exact expected reward of the decoder, so that intervals are
those of languages and samples alone. DIR gets regime.jsonl, a line for each point and arm, and
regime.png; the command goes on where it was cut. docs/regime.md holds what was expected before.
"""

import json
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from spg_jax import microscope
from spg_jax.comparison.statistics import Estimate, estimate, percent
from spg_jax.microscope import Decoder, Subject
from spg_jax.process import cli
from spg_jax.rl import toys
from spg_jax.rl.toy_training import (
    exact_gradient,
    gradient_of_objective,
    make_training,
    rewards_of_mass,
)

FLAGS = flags.FLAGS
ARMS: Mapping[str, Mapping[str, Any]] = {
    'none': {'spg.negative': 'none'},
    'ELBO': {'spg.negative': 'elbo'},
    'EUBO': {'spg.negative': 'eubo'},
    'mixture': {},
    'mixture, centred': {'spg.baseline': 'each'},
}
# With the exact likelihood of the decoder: whether rows with A < 0 are left out.
EXACT = {'exact, none': True, 'exact, signed': False}
RATES = (1e-3, 3e-3, 1e-2)
TUNED, MEASURED = range(48, 60), range(48)  # seeds of toys
LOOKS = 10


class Point(NamedTuple):
    """A place on an axis; what it does not name is that of the centre."""

    axis: str
    level: str
    settings: Mapping[str, Any] = {}
    decoder: Decoder = microscope.CONFIDENCE
    reward: str = ''  # '' gives 1 for random completions whose probability is `right`
    right: float = 0.15
    longer: int = 1  # times as many updates


CENTRE = Point('centre', '')
TWO_A_STEP = Point('tokens a step', '2', decoder=Decoder('two a step', steps=2))
COLD = Point('temperature', '0.25', decoder=Decoder('T = 0.25', temperature=0.25))
RANDOM = Point('order', 'random', decoder=Decoder('random', commit='random', block_length=4))
POINTS = (
    CENTRE,
    Point('right at the start', '2 %', right=0.02),
    Point('right at the start', '25 %', right=0.25),
    Point('right at the start', '40 %', right=0.4),
    Point('right at the start', '70 %', right=0.7),
    Point('reward', 'graded', reward='cells'),
    TWO_A_STEP,
    COLD,
    RANDOM,
    Point('masks', 'uniform', {'corruption.kind': 'uniform'}),
    Point('updates a rollout', '10', {'rl.inner_updates': 10}),
    Point('updates', 'x 5', longer=5),
)
# Where worse completions were found to pay or to cost: there the exact likelihood tells bias apart.
EXACT_AT = (CENTRE, TWO_A_STEP, COLD, RANDOM)


def main(_: Sequence[str]) -> None:
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / 'regime.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    updates = {(point.axis, point.level): point.longer * FLAGS.updates for point in POINTS}
    # Records of another --updates stay in the file, and are no part of these tables.
    records = [
        record
        for record in map(json.loads, lines)
        if record['updates'] == updates[record['axis'], record['level']]
    ]
    done = {(record['axis'], record['level'], record['arm']) for record in records}
    params = toys.learn(range(TUNED.stop))  # A toy depends on its seed alone.
    # Laws and their derivatives take longest, so they come last.
    cases = [(point, arm) for point in POINTS for arm in ARMS]
    for point, arm in cases + [(point, arm) for point in EXACT_AT for arm in EXACT]:
        if (point.axis, point.level, arm) in done:
            continue
        records.append(measure(point, arm, params))
        with path.open('a') as file:
            file.write(json.dumps(records[-1]) + '\n')
        print(*records[-1].values(), flush=True)
    for figure in ('mean', 'end'):
        for arms in ([arm for arm in ARMS if arm != 'none'], list(EXACT)):
            print(f'{figure}\n\n{table(records, figure, arms)}\n')
        none, signed = EXACT
        print(f'{figure}\n\n{table(records, figure, [signed], reference=none)}\n')
    print(f'by learning rate\n\n{table_of_rates(records)}\n')
    draw(records, out / 'regime.png')


def measure(point: Point, arm: str, params: Any) -> dict[str, Any]:
    """The values of an arm at a point, with the learning rate that is best on other toys."""
    started = time.process_time()
    settings = {**point.settings, **ARMS.get(arm, {})}
    parts = microscope.parts_of(Subject(point.axis, arm, 'spg', settings, point.decoder))
    law_of = jax.jit(
        lambda params: toys.laws(toys.table_of_network(toys.network(), params), parts.sampling)
    )
    updates = point.longer * FLAGS.updates
    if arm in EXACT:
        gradient = exact_gradient(parts.sampling, parts.batching, better_only=EXACT[arm])
    else:
        gradient = gradient_of_objective(parts.objective, parts.batching)
    train = make_training(gradient, parts.sampling, parts.batching, parts.optimizer, updates, LOOKS)
    many = jax.vmap(train, (0, 0, 0, None))
    options = {'xla_cpu_use_fusion_emitters': False}  # which compiles in less time
    train = jax.jit(many, compiler_options=options)

    def values(seeds: range, rate: float) -> np.ndarray:
        """[seeds, K + 1]."""
        chosen = [jax.tree.map(itemgetter(seed), params) for seed in seeds]
        rewards = [
            toys.rewards(point.reward, seed)
            if point.reward
            else rewards_of_mass(np.asarray(law_of(each)), point.right, seed)
            for seed, each in zip(seeds, chosen, strict=True)
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *chosen)
        return np.asarray(train(stacked, np.stack(rewards), np.asarray(seeds, np.uint32), rate))

    tuned = {rate: float(values(TUNED, rate)[:, -1].mean()) for rate in RATES}
    best = max(tuned, key=tuned.get)
    measured = values(MEASURED, best)
    return {
        'axis': point.axis,
        'level': point.level,
        'arm': arm,
        'rate': best,
        'updates': updates,
        'tuned': {str(rate): value for rate, value in tuned.items()},
        'curve': measured.mean(0).round(4).tolist(),
        'end': measured[:, -1].round(5).tolist(),
        'best': measured.max(-1).round(5).tolist(),
        'mean': measured[:, 1:].mean(-1).round(5).tolist(),
        'cpu_seconds': round(time.process_time() - started),
    }


def by_place(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Records by point, in the order of POINTS, and there by arm."""
    places: dict[tuple[str, str], dict[str, Any]] = {(x.axis, x.level): {} for x in POINTS}
    for record in records:
        places[record['axis'], record['level']][record['arm']] = record
    return places


def over(at: Mapping[str, Any], reference: str, arm: str, figure: str) -> Estimate:
    """The mean difference of an arm to the one that it is compared with, toy by toy."""
    pairs = zip(at[arm][figure], at[reference][figure], strict=True)
    return estimate([one - other for one, other in pairs])


def table(
    records: Sequence[dict[str, Any]], figure: str, arms: Sequence[str], reference: str = 'none'
) -> str:
    """Values of one arm, by default better completions alone, and differences to it, in per cent.

    The last line has the means of the differences over the points.

    Args:
      records: of the measurements.
      figure: 'end', or 'mean' for the mean over the looks at a training.
      arms: whose differences are shown, at the points that have any of them.
      reference: the arm that they are compared with.
    """
    head = ['axis', 'level', 'start', reference, *(f'{arm} − {reference}' for arm in arms)]
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    means: dict[str, list[float]] = {arm: [] for arm in arms}
    for (axis, level), at in by_place(records).items():
        if reference not in at or not any(arm in at for arm in arms):
            continue
        cells = [axis, level, f'{100 * at[reference]["curve"][0]:.0f}']
        cells.append(percent(estimate(at[reference][figure])))
        for arm in arms:
            difference = over(at, reference, arm, figure) if arm in at else None
            cells.append(percent(difference, signed=True) if difference else '–')
            means[arm] += [difference.mean] if difference else []
        lines.append(f'| {" | ".join(cells)} |')
    over_points = [f'{100 * np.mean(values):+.1f}' if values else '–' for values in means.values()]
    lines.append(f'| {" | ".join(["mean", "", "", "", *over_points])} |')
    return '\n'.join(lines)


def table_of_rates(records: Sequence[dict[str, Any]]) -> str:
    """Values at the end by learning rate, on the toys that rates are chosen with, in per cent.

    They are means over all points, and those of arms with exact likelihoods over theirs.
    """
    arms = [*ARMS, *EXACT]
    lines = [f'| {" | ".join(["learning rate", *arms])} |', '|---' * (len(arms) + 1) + '|']
    for rate in map(str, RATES):  # as keys of JSON
        ends = [[r['tuned'][rate] for r in records if r['arm'] == arm] for arm in arms]
        cells = [f'{100 * np.mean(values):.1f}' if values else '–' for values in ends]
        lines.append(f'| {" | ".join([rate, *cells])} |')
    return '\n'.join(lines)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Differences to learning from better completions alone, and the curves of the centre."""
    from matplotlib.figure import Figure

    places = {place: at for place, at in by_place(records).items() if 'none' in at}
    figure = Figure(figsize=(12, 4.5), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    arms = [arm for arm in (*ARMS, *EXACT) if arm != 'none']
    for number, arm in enumerate(arms):
        shown = [(x, at) for x, at in enumerate(places.values()) if arm in at]
        estimates = [over(at, 'none', arm, 'mean') for _, at in shown]
        left.errorbar(
            [x + 0.12 * (number - 2.5) for x, _ in shown],
            [100 * each.mean for each in estimates],
            [100 * each.half for each in estimates],
            fmt='s' if arm in EXACT else 'o',
            color=f'C{number + 1}',
            markersize=4,
            label=arm,
        )
    left.axhline(0, color='C0', label='none')
    names = [f'{axis} {level}'.strip() for axis, level in places]
    left.set_xticks(range(len(places)), names, rotation=30, ha='right')
    left.set(ylabel='expected reward over training, − none, points')
    left.legend(fontsize=8, ncols=7, loc='lower center', bbox_to_anchor=(0.5, 1.0))
    left.grid(alpha=0.3, axis='y')
    for number, arm in enumerate(ARMS):
        record = places[CENTRE.axis, CENTRE.level].get(arm)
        if record:
            x = np.linspace(0, record['updates'], len(record['curve']))
            right.plot(x, 100 * np.asarray(record['curve']), color=f'C{number}', label=arm)
    right.set(xlabel='updates', ylabel='expected reward, %', title='at the centre')
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == '__main__':
    flags.DEFINE_integer('updates', 300, 'Updates of a training.', lower_bound=100)
    cli.define_path_flag('out', 'runs/regime', 'The folder of records and picture.', saves=True)
    cli.run(main)
