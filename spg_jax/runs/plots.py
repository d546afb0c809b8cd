"""The curves of a run in one picture."""

from pathlib import Path

from spg_jax.runs.metrics import read_rows

Panels = tuple[tuple[str, tuple[str, ...]], ...]

LARGEST = 1e100  # Matplotlib calculates with numbers below this one.
# Title of each panel, and the metrics that it shows.
PANELS: Panels = (
    ('reward', ('reward', 'reward_max_of_group')),
    ('validation', ('validation_accuracy', 'validation_grid_accuracy')),
    ('nats per token', ('elbo_of_better', 'elbo_of_worse', 'eubo_minus_elbo')),
    (
        'shares',
        (
            'groups_with_signal',
            'distinct_completions',
            'eos_rate',
            'commonest_token',
            'repeats',
        ),
    ),
    ('gradient norm', ('gradient_norm',)),
    ('length', ('length',)),
)


def curves(workdir: Path, panels: Panels = PANELS) -> Path:
    """Draws `curves.png` from `metrics.jsonl`, both in `workdir`, and returns its path.

    Args:
      workdir: of the training.
      panels: title of each panel, and the metrics that it shows; an even number of them.
    """
    # Pyplot would ask for the backend of a screen; a figure alone draws into files.
    from matplotlib.figure import Figure

    rows = read_rows(workdir / 'metrics.jsonl')
    columns = len(panels) // 2
    figure = Figure(figsize=(4 * columns, 6), layout='constrained')
    axes = figure.subplots(2, columns)
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            points = [(row['step'], row[name]) for row in rows if _is_drawable(row.get(name))]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.replace('_', ' '), lw=1.2)
        axis.set(title=title, xlabel='updates')
        if axis.get_legend_handles_labels()[0]:  # An objective may have none of these figures.
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    path = workdir / 'curves.png'
    figure.savefig(path, dpi=110)
    return path


def _is_drawable(value: object) -> bool:
    """Whether a value of a row is a number; a damaged row that is JSON may hold anything."""
    return type(value) in (int, float) and abs(value) < LARGEST
