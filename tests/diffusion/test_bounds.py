"""Bounds against published numbers, numerical derivatives and hostile inputs."""

from functools import cache
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax.diffusion.bounds import (
    PAIRINGS,
    check_pairing,
    completion_log_probs,
    estimator,
    mixture,
)
from spg_jax.diffusion.corruption import KINDS, Corruption, scored_positions
from spg_jax.models.transformer import Transformer
from spg_jax.models.weights import load_checkpoint

pytestmark = [pytest.mark.fast, pytest.mark.numerical]

REFERENCE = Path(__file__).parents[1] / 'reference'
MASK, EOS = 250, 1
CASES = [
    f'{corruption}/{estimate}/beta{beta}'
    for corruption in ('block_random', 'random', 'block_all')
    for estimate, betas in (
        ('elbo', (1.0,)),
        ('eubo', (1.0, 1.5, 2.0)),
        ('mix', (1.0, 1.5, 2.0)),
        ('zero', (1.0,)),
    )
    for beta in betas
]
# estimate -> (share of the EUBO in the negative estimate, factor of that estimate in the loss)
NEGATIVE = {'elbo': (0.0, 1.0), 'eubo': (1.0, 1.0), 'mix': (0.5, 1.0), 'zero': (0.0, 0.0)}


@pytest.fixture(scope='module')
def published():
    with np.load(REFERENCE / 'spg_estimators.npz') as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope='module')
def spg_loss(published):
    """Parameters, lengths, and a function from (params, noisy, beta, omega, scale) to the loss.

    It returns ((loss, (bound of each sequence, negative estimates)), gradient).
    """
    config, _, params = load_checkpoint(REFERENCE / 'tiny_llada')
    model = Transformer(config)
    completion = jnp.asarray(published['completion'])
    scored = scored_positions(completion, EOS)
    advantage = jnp.asarray(published['advantages'])
    released = estimator('released', block_length=8)
    rows, length = completion.shape

    def loss(params, noisy, beta, omega, scale):
        draws = noisy.shape[1]
        tokens = noisy.reshape(rows * draws, -1)
        hidden = model.apply({'params': params}, tokens, tokens >= 0, method='hidden')
        logits = model.apply({'params': params}, hidden[:, -length:], method='unembed')
        logp = jax.vmap(completion_log_probs)(logits.reshape(rows, draws, length, -1), completion)
        masked = noisy[:, :, -length:] == MASK
        block = jnp.zeros((rows, draws), jnp.int32)
        elbo = jax.vmap(released.elbo)(logp, masked, scored, block)
        eubo = jax.vmap(released.eubo, (0, 0, 0, 0, None))(logp, masked, scored, block, beta)
        negative = scale * mixture(eubo, elbo, omega)
        nats = jnp.where(advantage > 0, elbo, negative)
        return -(advantage * nats).sum() / scored.sum(), (nats, negative)

    return params, scored.sum(-1), jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_scored_positions_are_the_published_completion_mask(published):
    assert_allclose(scored_positions(published['completion'], EOS), published['completion_mask'])


@pytest.mark.parametrize('case', CASES)
def test_released_estimates_losses_and_gradients_are_the_published_ones(published, spg_loss, case):
    params, lengths, loss = spg_loss
    corruption, estimate, beta = case.split('/')
    (value, (nats, negative)), gradient = loss(
        params,
        published[f'{corruption}/noisy'],
        float(beta.removeprefix('beta')),
        *NEGATIVE[estimate],
    )
    # The published values are per token.
    assert_allclose(nats / lengths, published[f'{case}/seq_logp'], rtol=1e-5)
    assert_allclose(negative / lengths, published[f'{case}/negative_estimate'], rtol=1e-5)
    assert_allclose(value, published[f'{case}/loss'], rtol=1e-5)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    assert_allclose(norm, published[f'{case}/grad_norm'], rtol=1e-5)
    expected = published[f'{case}/grad_q_proj0']  # [out, in]
    query_gradient = np.asarray(gradient['layers']['query']['kernel'][0]).T
    assert_allclose(query_gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_published_cases_are_all_tested(published):
    assert len(CASES) == 24
    assert set(CASES) == {name.rpartition('/')[0] for name in published if '/beta' in name}


def per_token_upper(logp, masked, length, beta, form):
    """The upper bounds [...] of logp [..., M, C] by their definition, in float64, token by token
    and not in log space."""

    def share(k, i):
        return length / masked[k].sum() if masked[k, i] else 0.0

    terms = []
    for i in range(logp.shape[-1]):
        if masked[:, i].any():
            draws = range(len(masked))
            mean = np.mean([share(k, i) * np.exp(beta * logp[..., k, i]) for k in draws], axis=0)
            terms.append(mean - 1.0 if form == 'loose_eubo' else np.log(mean))
    order = max(beta, length) if form == 'strict_eubo' else beta
    return length * np.mean(terms, axis=0) / order


def by_definition(name, form, logp, masked, scored, block, block_length, beta):
    """Bounds [...] of logp [..., M, C] by the formula in `spg_jax.diffusion.bounds`, in float64."""
    masked = masked & scored
    draws = range(len(masked))
    if name != 'block':
        if form == 'elbo':
            return scored.sum() * np.mean([logp[..., k, masked[k]].mean(-1) for k in draws], axis=0)
        return per_token_upper(logp, masked, scored.sum(), beta, form)
    blocks = -(-scored.sum() // block_length)
    inside = np.arange(len(scored)) // block_length
    values = []
    for b in sorted(set(block.tolist())):
        here = scored & (inside == b)
        draws = np.flatnonzero(block == b)
        if form == 'elbo':
            values += [here.sum() * logp[..., k, masked[k] & here].mean(-1) for k in draws]
        else:
            values.append(
                per_token_upper(logp[..., draws, :], masked[draws] & here, here.sum(), beta, form)
            )
    return blocks * np.mean(values, axis=0)


def with_numerical_gradient(definition, logp):
    """The value of a function of logp [M, C] and its central differences, [] and [M, C]."""
    step = 1e-6
    nudges = step * np.eye(logp.size).reshape(-1, *logp.shape)
    slopes = (definition(logp + nudges) - definition(logp - nudges)) / (2 * step)
    return definition(logp), slopes.reshape(logp.shape)


@cache
def value_and_gradient(name, form):
    return jax.jit(jax.value_and_grad(getattr(estimator(name, block_length=4), form)))


@pytest.fixture
def example():
    """Five draws of eleven positions in blocks of four, nine of them scored."""
    rng = np.random.default_rng(0)
    logp = np.log(rng.uniform(0.02, 0.9, (5, 11)))
    scored = np.arange(11) < 9
    block = np.array([1, 0, 1, 2, 0])
    masked = rng.random((5, 11)) < 0.4
    masked[:, 9:] = True
    masked[np.arange(5), block * 4] = True
    masked[:, 5] = False  # no draw masks this position
    return logp, masked, scored, block


UPPER = ('eubo', 'loose_eubo', 'strict_eubo')


@pytest.mark.parametrize(
    ('form', 'beta'), [('elbo', None), *((form, beta) for form in UPPER for beta in (1, 3.5, 12))]
)
@pytest.mark.parametrize('name', ['released', 'block'])
def test_bound_and_gradient_are_those_of_the_definition(example, name, form, beta):
    logp, *others = example
    orders = () if form == 'elbo' else (float(beta),)
    value, gradient = value_and_gradient(name, form)(logp.astype(np.float32), *others, *orders)
    expected, numerical = with_numerical_gradient(
        lambda logp: by_definition(name, form, logp, *others, 4, beta), logp
    )
    assert_allclose(value, expected, rtol=2e-6)
    assert_allclose(gradient, numerical, atol=1e-5 * np.abs(numerical).max())


def test_tokens_too_unlikely_for_float32_keep_their_place_in_the_upper_bound():
    """exp(-1e4) is 0 in float32: outside log space the token would be dropped, or give -inf."""
    logp = jnp.array([[-1e4, -1.0], [-1e4, -1.0]])
    masked = jnp.ones((2, 2), bool)
    bound = estimator('released', 1).eubo
    value, gradient = jax.jit(jax.value_and_grad(bound))(
        logp, masked, masked[0], jnp.zeros(2, jnp.int32), 2.0
    )
    assert_allclose(value, -10001.0, rtol=1e-6)
    assert_allclose(gradient, np.full((2, 2), 0.5), rtol=1e-6)


@pytest.mark.parametrize('form', ['elbo', 'eubo', 'loose_eubo', 'strict_eubo'])
@pytest.mark.parametrize('name', ['released', 'block'])
@pytest.mark.parametrize('masks', ['all', 'none', 'one empty draw', 'only unscored'])
def test_hostile_inputs_give_finite_values_and_gradients(name, form, masks):
    orders = () if form == 'elbo' else (4.0,)
    block, shape = np.array([0, 0, 2, 1, 0]), (5, 11)  # as in the example, for the same programs
    for logp, length in product((-1e4, -1e-9, 0.0), (0, 1, 6, 11)):
        scored = np.arange(11) < length
        masked = {
            'all': np.ones(shape, bool),
            'none': np.zeros(shape, bool),
            'one empty draw': np.broadcast_to(np.arange(5)[:, None] != 1, shape),
            'only unscored': np.broadcast_to(~scored, shape),
        }[masks]
        value, gradient = value_and_gradient(name, form)(
            np.full(shape, logp, np.float32), masked, scored, block, *orders
        )
        gradient = np.asarray(gradient)
        assert np.isfinite(value) and np.isfinite(gradient).all(), (logp, length)
        if length == 0 or masks in ('none', 'only unscored'):
            assert value == 0.0 and not gradient.any()


@pytest.mark.parametrize('form', ['elbo', 'eubo', 'loose_eubo', 'strict_eubo'])
@pytest.mark.parametrize('name', ['released', 'block'])
def test_a_draw_that_masks_nothing_changes_nothing(example, name, form):
    """If such a draw counted as 0 nats, it would pull the bound towards a certain sequence."""
    logp, masked, scored, block = example
    masked[-1] = False
    orders = () if form == 'elbo' else (1.5,)
    value, gradient = value_and_gradient(name, form)(
        logp.astype(np.float32), masked, scored, block, *orders
    )
    expected, numerical = with_numerical_gradient(
        lambda logp: by_definition(name, form, logp, masked[:-1], scored, block[:-1], 4, 1.5),
        logp[:-1],
    )
    assert_allclose(value, expected, rtol=2e-6)
    numerical = np.pad(numerical, ((0, 1), (0, 0)))
    assert_allclose(gradient, numerical, atol=1e-5 * np.abs(numerical).max())


def test_completion_log_probs_are_float32_whatever_the_logits():
    logits = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32) * 4
    completion = np.array([3, 0, 6, 6, 1])
    logp = completion_log_probs(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(completion))
    exact = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    assert logp.dtype == jnp.float32
    assert_allclose(logp, exact[:, np.arange(5), completion], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', PAIRINGS)
def test_estimators_refuse_corruptions_they_do_not_bound(name, kind):
    allowed = name == 'released' or (name, kind) in {('paper', 'uniform'), ('block', 'block')}
    corruption = Corruption(kind, 2, 4, perturb_completion=False)
    if allowed:
        check_pairing(name, corruption)
    else:
        with pytest.raises(ValueError, match=f'{name}.*{kind}.*use corruption'):
            check_pairing(name, corruption)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'perturb_completion': True}, 'clean earlier blocks'),
        ({'perturb_completion': False, 'block_draw': 'released'}, 'drawn uniformly'),
    ],
)
def test_block_estimator_refuses_what_makes_it_biased(options, message):
    corruption = Corruption('block', 2, 4, **options)
    check_pairing('released', corruption)
    with pytest.raises(ValueError, match=message):
        check_pairing('block', corruption)


def test_unknown_estimators_are_refused():
    with pytest.raises(ValueError, match="'mine'; use one of released, paper, block"):
        estimator('mine', 4)
    with pytest.raises(ValueError, match="'mine'; use one of released, paper, block"):
        check_pairing('mine', Corruption('block', 2, 4))
    with pytest.raises(ValueError, match='at least 1'):
        estimator('block', 0)
