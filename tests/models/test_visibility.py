"""What a query sees: every implementation of attention against a loop over the rule.

As in test_attention.py, the kernel for TPUs is interpreted, and for CUDA the portable form of the
function that calls the kernel runs.
"""

import functools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.models import splash
from spg_jax.models.splash import splash_attention
from spg_jax.models.visibility import Visibility
from tests.meshes import mesh_of
from tests.models.test_attention import HERE, PRECISE

pytestmark = pytest.mark.numerical

FORMULAS = Path(__file__).parents[1] / 'reference' / 'families' / 'formulas' / 'formulas.npz'
LENGTH = 12
STARTS = np.array([0, 3, 5, 1])  # the first valid position of each row
VALID = np.arange(LENGTH)[None, :] >= STARTS[:, None]
POSITION = np.maximum(np.arange(LENGTH)[None, :] - STARTS[:, None], 0)
DOCUMENT = np.array([[0] * 12, [0] * 5 + [1] * 7, [2] * 8 + [0] * 4, [1] * 6 + [3] * 6])

CASES = {
    'causal': Visibility(VALID, block_length=1),
    'causal from the first token': Visibility(VALID, POSITION, block_length=1),
    'blocks of columns': Visibility(VALID, block_length=5),
    'blocks from the first token': Visibility(VALID, POSITION, block_length=4),
    'documents': Visibility(VALID, document=DOCUMENT),
    'causal documents': Visibility(VALID, document=DOCUMENT, block_length=1),
    'blocks of documents': Visibility(VALID, document=DOCUMENT, block_length=4),
    'halves': Visibility(np.ones((4, 12), bool), block_length=2, halves=True),
    'halves of documents': Visibility(
        np.ones((4, 12), bool), document=np.tile(DOCUMENT[:, 6:], 2), block_length=4, halves=True
    ),
}


def sees(visible, row, query, key):
    """The rule for one query and one key, in words of the publication."""
    half = LENGTH // 2 if visible.halves else LENGTH
    position = [x % half for x in range(LENGTH)]
    if visible.position is not None:
        position = visible.position[row]
    if not visible.valid[row, key]:
        return False
    if visible.document is not None and visible.document[row, query] != visible.document[row, key]:
        return False
    if not visible.block_length:
        return True
    query_block, key_block = (int(position[x]) // visible.block_length for x in (query, key))
    if not visible.halves:
        return key_block <= query_block
    query_is_noisy, key_is_noisy = query < half, key < half
    if query_is_noisy:
        return key_block == query_block if key_is_noisy else key_block < query_block
    return not key_is_noisy and key_block <= query_block


@functools.cache
def rule(case):
    """Whether each query sees each key, [B, L, L]."""
    shape = (4, LENGTH, LENGTH)
    return np.reshape([sees(CASES[case], *index) for index in np.ndindex(shape)], shape)


def inputs(dtype):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(4, LENGTH, n, 4)).astype(jnp.dtype(dtype)) for n in (4, 2, 2)]


@jax.jit
def masks(cases):
    """The masks of several visibilities by name, by one program."""
    return {name: visible.mask() for name, visible in cases.items()}


def test_masks_are_the_rule():
    for case, mask in masks(CASES).items():
        assert_array_equal(mask, rule(case), err_msg=case)


@pytest.mark.parametrize(
    ('implementation', 'case'),
    [
        ('splash', 'causal from the first token'),
        ('splash', 'blocks of columns'),
        ('splash', 'blocks from the first token'),
        ('splash', 'documents'),
        ('splash', 'blocks of documents'),
        ('splash', 'halves of documents'),
        ('einsum', 'causal from the first token'),
        ('folded', 'blocks of documents'),
        ('cudnn', 'halves of documents'),
    ],
)
def test_attention_follows_the_rule(implementation, case):
    """Splash has masks of its own, each part of which is in one of the cases. The others mask by
    `Visibility.mask`, which the test above compares with the rule; each shows here that it does, in
    a case that differs between rows."""
    exact = implementation in PRECISE
    q, k, v = inputs('float32' if exact else 'bfloat16')
    mixed = np.asarray(jax.jit(HERE[implementation])(q, k, v, CASES[case]), np.float64)
    allowed = rule(case)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    tolerance = {'atol': 2e-6} if exact else {'rtol': 2**-6, 'atol': 2**-6}
    assert np.isfinite(mixed).all()
    valid = CASES[case].valid
    expected = np.zeros(mixed.shape)
    for row, query, head in np.ndindex(4, LENGTH, 4):
        if valid[row, query]:  # The output on padding is meaningless.
            keys = allowed[row, query]
            weights = np.exp(k[row, keys, head // 2] @ q[row, query, head] / 2)
            expected[row, query, head] = weights / weights.sum() @ v[row, keys, head // 2]
    assert_allclose(mixed[valid], expected[valid], **tolerance)


@pytest.mark.parametrize('case', ['blocks from the first token', 'halves of documents'])
def test_splash_over_several_blocks_and_devices(monkeypatch, case):
    """Against einsum on one device; the mask of the kernel skips whole blocks. The last block is
    padded, and in one row the first holds only padding.

    One case has the gradients too, which the kernel computes with the mask that it is given.
    """
    monkeypatch.setattr(splash, 'LARGEST_BLOCK', 128)
    length, pads = 300, np.array([0, 45, 2, 131])
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4, length, n, 4)).astype(np.float32) for n in (4, 2, 2))
    if case.startswith('halves'):
        document = np.tile((np.arange(length) % 150 > 70).astype(np.int32), (4, 1))
        visible = Visibility(np.ones((4, length), bool), None, document, 10, halves=True)
    else:
        column = np.arange(length)[None, :]
        position = np.maximum(column - pads[:, None], 0)
        visible = Visibility(column >= pads[:, None], position, block_length=32)
    weights = np.where(visible.valid[:, :, None, None], rng.normal(size=q.shape), 0.0)

    def outcome(attend):
        def weighted(qkv, visible):
            mixed = attend(*qkv, visible) * weights
            return jnp.sum(mixed), mixed

        with_gradients = jax.grad(weighted, has_aux=True)
        program = weighted if case.startswith('halves') else with_gradients
        first, mixed = jax.jit(program)((q, k, v), visible)
        return (mixed,) if case.startswith('halves') else (mixed, first)

    expected = outcome(HERE['einsum'])
    with jax.set_mesh(mesh_of(2, 1, 2)):
        actual = outcome(partial(splash_attention, interpret=True))
    jax.tree.map(partial(assert_allclose, atol=2e-5), actual, expected)


def test_masks_are_those_of_the_published_functions():
    formulas = np.load(FORMULAS)
    names = [name for name in formulas if name.startswith('mask_')]
    assert len(names) > 8
    cases = {}
    for name in names:
        length, block = (int(part[1:]) for part in name.split('/')[1].split('_'))
        halves = name.startswith('mask_2L')
        valid = np.ones((1, length * (2 if halves else 1)), bool)
        cases[name] = Visibility(valid, block_length=block, halves=halves)
    for name, mask in masks(cases).items():
        assert_array_equal(mask[0], formulas[name], err_msg=name)


def test_what_a_kernel_cannot_do_is_refused_with_the_fix():
    q, k, v = inputs('float32')
    visible = Visibility(VALID, POSITION, DOCUMENT, block_length=4)
    with pytest.raises(
        ValueError, match="'splash' counts the blocks .* use model.attention einsum"
    ):
        splash_attention(q, k, v, visible)
    with pytest.raises(ValueError, match='block_length is 0; use a positive number'):
        Visibility(VALID, halves=True)
    with pytest.raises(ValueError, match='have 11 tokens; use an even number'):
        Visibility(VALID[:, :11], block_length=2, halves=True)
