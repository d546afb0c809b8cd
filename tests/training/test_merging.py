"""The mean of the best checkpoints, against published numbers and by hand."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from spg_jax.training.merging import best_steps, mean

FORMULAS = np.load(
    Path(__file__).parents[1] / 'reference' / 'families' / 'formulas' / 'formulas.npz'
)


def test_the_mean_of_the_best_is_the_published_one():
    golden = {name: FORMULAS[f'merge/{name}'] for name in ('weights', 'bias', 'step', 'val_nll')}
    steps = golden['step'].tolist()
    chosen = best_steps(dict(zip(steps, golden['val_nll'], strict=True)), int(FORMULAS['merge/k']))
    assert sorted(chosen) == sorted(FORMULAS['merge/chosen_steps'].tolist())
    places = [steps.index(step) for step in chosen]
    merged = mean({'w': golden['weights'][i], 'b': golden['bias'][i]} for i in places)
    assert_allclose(merged['w'], FORMULAS['merge/merged_weights'], rtol=1e-6)
    assert_allclose(merged['b'], FORMULAS['merge/merged_bias'], rtol=1e-6)


def test_by_hand():
    assert best_steps({10: 0.5, 20: 0.25, 30: 0.5, 40: 1.0}, 2) == [20, 10]
    halves = mean([{'x': jnp.asarray([1.0, 2.0], jnp.bfloat16)}, {'x': jnp.asarray([2.0, 2.0])}])
    assert halves['x'].tolist() == [1.5, 2.0]
