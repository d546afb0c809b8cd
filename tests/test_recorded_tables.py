"""The benchmarks whose tables are recorded: their figures against numbers by hand."""

import numpy as np

from benchmarks import conversion, samplers
from spg_jax.diffusion.sampling import SamplingConfig

# Student's t for the 95 % interval of a mean over two seeds, whose half width is t |a - b| / 2.
T = 12.706


def record(seed: int, shift: float, **more: float) -> dict:
    curve = [[20, 4, 1.0], [40, 0, 0.5 + shift], [60, 4, 0.3]]
    return {
        'task': 'sudoku',
        'seed': seed,
        'model': conversion.CONVERTED,
        'phases': [[4, 20, 1.0], [0, 20, 1.0], [4, 20, 0.3]],
        'curve': curve,
        'loss': 0.2 + shift,
        'accuracy': 0.5 + shift,
        'grid_accuracy': 0.25,
        'tokens_per_pass': 2.0 + shift,
        **more,
    }


def test_the_table_of_conversions_has_means_with_their_intervals():
    records = [record(0, 0.0), record(1, 0.1)]
    line = conversion.table(records).splitlines()[-1]
    half = T * 0.1 / 2
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    loss, passes = f'0.250 ± {half:.3f}', f'2.05 ± {half:.2f}'
    cells_and_grids = f'55.0 ± {100 * half:.1f} / 25.0 ± 0.0'
    assert cells == ['sudoku', 'converted', '2', loss, cells_and_grids, '–', passes, '–']


def test_the_figure_of_conversions_is_drawn(tmp_path):
    """A task has one conversion here, and the other ones are missing."""
    conversion.draw([record(0, 0.0), record(1, 0.1)], tmp_path / 'figure.png')
    assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')


def test_tokens_a_pass_are_those_of_the_passes_that_a_row_needs():
    """The first row commits 8 tokens in 2 + 3 passes, the second ends with its block of 1 pass."""
    steps = np.array([[0, 0, 1, 1, 4, 5, 5, 6], [0, 0, 0, 0, -1, -1, -1, -1]])
    decoding = SamplingConfig(8, 8, 4, 0.0)
    assert samplers.tokens_per_pass(steps, decoding) == (8 + 4) / (5 + 1)
    assert samplers.passes_of(steps, decoding) == 2 + 3  # of the batch, whose slowest row decides
