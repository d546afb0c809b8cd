"""The learning rate of RL over a run, against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax.training.optimizers import AdamW, for_rl

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
