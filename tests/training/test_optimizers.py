"""Learning rates against closed forms, Muon against a plain loop, and where moments lie."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from spg_jax import sharding
from spg_jax.training.optimizers import AdamW, for_pretraining, for_rl, state_shardings
from tests.meshes import mesh_of

pytestmark = pytest.mark.numerical
PEAK, STEPS = 0.01, 20


def settings(**changes) -> AdamW:
    fields = dict(learning_rate=PEAK, warmup_fraction=0.25, b1=0.9, b2=0.99)
    return AdamW(**fields | dict(weight_decay=0.0, grad_clip=1e9) | changes)


def rates(steps: int = STEPS + 3, **changes) -> np.ndarray:
    """The length of each step: under a constant gradient AdamW moves by its learning rate."""
    optimizer = for_rl(settings(**changes), STEPS)
    gradient = {'kernel': jnp.ones(())}

    def step(state, _):
        moves, state = optimizer.update(gradient, state, gradient)
        return state, -moves['kernel']

    return np.asarray(jax.lax.scan(step, optimizer.init(gradient), None, length=steps)[1])


def expected(schedule: str, share: float, warmup: int, step: int) -> float:
    if step < warmup:
        return PEAK * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / (STEPS - warmup))
    left = {'constant': 1.0, 'linear': 1 - done, 'cosine': (1 + math.cos(math.pi * done)) / 2}
    return PEAK * (share + (1 - share) * left[schedule] if schedule != 'constant' else 1.0)


@pytest.mark.parametrize('warmup', [0, 5])
@pytest.mark.parametrize(
    ('schedule', 'share'),
    [('constant', 0.5), ('linear', 0.0), ('linear', 0.25), ('cosine', 0.0), ('cosine', 0.25)],
)
def test_a_schedule_has_its_published_shape(schedule, share, warmup):
    fraction = warmup / STEPS
    found = rates(schedule=schedule, final_share=share, warmup_fraction=fraction)
    values = [expected(schedule, share, warmup, step) for step in range(STEPS + 3)]
    assert_allclose(found, values, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'schedule': 'step'}, "optimizer.schedule is 'step'; use one of constant, linear, cosine"),
        ({'final_share': 1.5}, 'optimizer.final_share is 1.5'),
        ({'final_share': -0.1}, 'optimizer.final_share is -0.1'),
    ],
)
def test_a_schedule_without_a_meaning_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Muon's five Newton-Schulz iterations, as published."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrix / np.linalg.norm(matrix)).astype(np.float64)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_moves_the_kernel_of_each_layer_by_an_orthogonal_matrix():
    """Under a constant gradient neither momentum nor clipping changes its direction."""
    random = np.random.default_rng(0)
    shapes = {'embedding': (5, 4), 'layers': {'up': (2, 4, 6), 'down': (2, 6, 4), 'scale': (2, 4)}}
    gradient = jax.tree.map(
        lambda shape: random.normal(size=shape).astype(np.float32), shapes, is_leaf=_is_shape
    )
    moves = second_move(for_pretraining(0.1, 0.0, 1e9, 40, muon_rate=0.5), gradient)
    by_adamw = second_move(optax.adamw(0.1, 0.9, 0.98, nesterov=True, weight_decay=0.0), gradient)
    for name in ('up', 'down'):
        for layer, of_layer in enumerate(gradient['layers'][name]):
            rows, columns = of_layer.shape
            expected = -0.5 * max(1.0, columns / rows) ** 0.5 * orthogonal(of_layer)
            assert_allclose(moves['layers'][name][layer], expected, atol=2e-5)
    for part in (lambda tree: tree['embedding'], lambda tree: tree['layers']['scale']):
        assert_allclose(part(moves), part(by_adamw), rtol=1e-6)


def second_move(optimizer: optax.GradientTransformation, gradient: dict) -> dict:
    """A schedule's first learning rate is 0, and its second one here the peak."""
    state = optimizer.init(gradient)
    for _ in range(2):
        move, state = jax.jit(optimizer.update)(gradient, state, gradient)
    return jax.device_get(move)


def _is_shape(x: object) -> bool:
    return isinstance(x, tuple)


@pytest.mark.parametrize('muon_rate', [0.0, 0.5])
def test_moments_lie_where_their_parameters_lie(muon_rate):
    mesh = mesh_of(1, 4, 2)
    split = jax.NamedSharding(mesh, jax.P(None, 'fsdp', 'tensor'))
    rows = jax.NamedSharding(mesh, jax.P('fsdp'))
    whole = sharding.replicated(mesh)
    places = {'params': {'embedding': rows, 'layers': {'up': split}}}
    shapes = {
        'params': {
            'embedding': jax.ShapeDtypeStruct((8, 4), jnp.float32),
            'layers': {'up': jax.ShapeDtypeStruct((2, 8, 4), jnp.float32)},
        }
    }
    optimizer = for_pretraining(0.1, 0.0, 1.0, 40, muon_rate)
    state = jax.eval_shape(optimizer.init, shapes)
    chosen = state_shardings(optimizer, shapes, places, whole)
    seen = []
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(chosen), strict=True):
        by_shape = {(8, 4): rows, (2, 8, 4): split}
        assert place == by_shape.get(leaf.shape, whole)
        seen.append(leaf.shape)
    assert seen.count((8, 4)) == 2  # AdamW's two moments
    assert seen.count((2, 8, 4)) == (1 if muon_rate else 2)  # Muon has one
