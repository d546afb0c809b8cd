"""Blocks counted from the prompt: bounds against enumerated likelihoods, pairs of masks and states
of rollouts; and the shift of Dream."""

import dataclasses
from functools import partial
from itertools import combinations, permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax.diffusion.bounds import completion_log_probs, estimator
from spg_jax.diffusion.corruption import Corruption
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.models.policy import Policy
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.rl.batching import Batching
from spg_jax.rl.collection import make_generate
from spg_jax.rl.objectives import REGISTRY, Protocol
from spg_jax.rl.plug_ins import ComplementaryPairs
from spg_jax.rl.scores import corrupt, moments
from tests.parameters import random_params
from tests.rl.conftest import random_rollout

pytestmark = pytest.mark.numerical

MASK, BLOCK = 9, 2
PROMPT = np.array([3, 1, 4])  # one position of its last block is free: the grid has offset 1
COMPLETION = np.array([2, 7, 1, 8, 2])
BLOCKS = ((0,), (1, 2), (3, 4))  # positions of the completion in each block of the model


@pytest.fixture(scope='module')
def policy():
    config = TransformerConfig(10, 16, 2, 2, 1, 32, visible_block=BLOCK, tie_embeddings=True)
    params = random_params(Transformer(config), seed=1)
    params['embedding'] = np.float32(3) * np.asarray(params['embedding'])  # far from uniform
    return Policy(config, MASK, 0, np.arange(10) != MASK), {'params': params}


@partial(jax.jit, static_argnums=0)
def logits_of(config, variables, tokens):
    """[1, L, V]; one program for each length of a row."""
    return Transformer(config).apply(variables, tokens, tokens >= 0)


def log_prob(policy, variables, position, known):
    """log p(token at a position | known ones), from a sequence that ends with the block.

    No later block is there that could be seen, so the mask of attention plays no part in this.
    """
    last = next(block for block in BLOCKS if position in block)[-1]
    noisy = np.where([i in known for i in range(last + 1)], COMPLETION[: last + 1], MASK)
    tokens = np.concatenate([PROMPT, noisy])
    logits = np.asarray(logits_of(policy.config, variables, tokens[None]), np.float64)
    logits = logits[0, 3 + position]
    return logits[COMPLETION[position]] - np.log(np.exp(logits).sum())


def orders_of_block(policy, variables, block):
    """The log-probability of a block, given the blocks before it, in every order."""
    sums = []
    for order in permutations(block):
        known, total = set(range(block[0])), 0.0
        for position in order:
            total += log_prob(policy, variables, position, known)
            known.add(position)
        sums.append(total)
    return np.array(sums)


def every_draw():
    """(block, masked positions), each as often as blocks, sizes and sets are drawn uniformly."""
    for index, block in enumerate(BLOCKS):
        later = [i for i in range(5) if i > block[-1]]
        weights = {1: [2, 2]} if len(block) == 1 else {1: [1], 2: [2]}
        for size, repeats in weights.items():
            for chosen in combinations(block, size):
                for _ in range(sum(repeats)):
                    yield index, [*chosen, *later]


def test_bounds_of_blocks_enclose_the_exact_likelihood(policy):
    policy, variables = policy
    draws = list(every_draw())
    block = np.array([index for index, _ in draws])
    masked = np.array([[i in chosen for i in range(5)] for _, chosen in draws])
    noisy = np.where(masked, MASK, COMPLETION)
    prompt = np.tile(np.concatenate([[0, 0], PROMPT]), (len(draws), 1))  # with padding
    valid = np.tile([False, False, True, True, True], (len(draws), 1))

    @jax.jit
    def log_probs(variables):
        logits = policy.completion_logits(variables, prompt, valid, noisy)
        return completion_log_probs(logits, jnp.asarray(COMPLETION))

    logp = log_probs(variables)
    orders = [orders_of_block(policy, variables, block) for block in BLOCKS]
    exact = sum(np.log(np.exp(sums).mean()) for sums in orders)
    bounds = estimator('block', BLOCK)

    @jax.jit
    def bounds_of(offset):
        """The ELBO, and two bounds from above."""
        rows = logp, masked, np.ones(5, bool), block
        uppers = [bounds.strict_eubo(*rows, beta, offset=offset) for beta in (1.0, 2.0)]
        return bounds.elbo(*rows, offset=offset), uppers

    elbo, uppers = bounds_of(np.int32(1))
    # In expectation over draws the bound is the mean over orders, block by block.
    assert_allclose(elbo, sum(sums.mean() for sums in orders), atol=2e-5)
    assert elbo < exact - 1e-3
    assert min(uppers) > exact
    # Blocks that were counted from the completion would be other blocks.
    assert abs(bounds_of(np.int32(0))[0] - elbo) > 1e-2


def test_corruption_masks_the_blocks_that_the_model_sees():
    corruption = Corruption('block', 40, BLOCK, 0.0, perturb_completion=False, from_prompt=True)
    draw = jax.jit(corruption)
    valid = np.asarray([False, False, True, True, True])
    draws = jax.device_get(draw(jax.random.key(0), valid, np.ones(5, bool)))
    assert (np.asarray(draws.offset) == 1).all()
    assert set(np.asarray(draws.block).tolist()) == {0, 1, 2}
    for index, masked in zip(draws.block, np.asarray(draws.masked)[:, 5:], strict=True):
        block = BLOCKS[int(index)]
        assert masked[block[-1] + 1 :].all() and not masked[: block[0]].any()
        assert masked[list(block)].any()
    # A short completion reaches fewer blocks; what comes after its end is always masked.
    draws = jax.device_get(draw(jax.random.key(1), valid, np.arange(5) < 2))
    assert set(np.asarray(draws.block).tolist()) == {0, 1}
    assert np.asarray(draws.masked)[:, 5 + 2 :].all()


def test_pairs_cover_the_blocks_that_the_model_sees():
    corruption = Corruption('block', 4, 4, 0.0, perturb_completion=False, from_prompt=True)
    rollout, pairs = random_rollout(), ComplementaryPairs(corruption)
    draws = jax.jit(lambda rows: corrupt(pairs, rows, moments(0, rows, jnp.int32(0), jnp.int32(0))))
    draws = jax.device_get(draws(rollout))
    offset = np.asarray(rollout.prompt_mask).sum(1) % 4
    assert len({*offset}) > 1
    assert (draws.offset == offset[:, None]).all()
    block_of_position = (np.arange(12) + offset[:, None]) // 4  # [B, C]
    region = block_of_position[:, None] == draws.block[:, :, None]  # [B, M, C]
    region &= np.asarray(rollout.scored)[:, None]
    masked = draws.masked[:, :, rollout.prompt.shape[1] :]
    assert ((masked[:, ::2] ^ masked[:, 1::2]) == region[:, ::2]).all()


@pytest.fixture(scope='module')
def sampled(policy):
    """(decoding, a rollout on the grid); the last blocks of its prompts have 1 and 0 free
    positions."""
    policy, variables = policy
    records = ('entropy', 'kept', 'log_prob')
    decoding = SamplingConfig(4, 4, BLOCK, 1.0, 'random', stop_early=False, records=records)
    prompt = np.int32([[5, 3, 1, 4], [3, 1, 4, 2]])
    valid = np.array([[False, True, True, True], [True] * 4])
    keys = jax.random.split(jax.random.key(0), 2)
    completion = make_generate(policy, decoding)(variables, prompt, valid, keys)
    rows = jax.tree.map(lambda x: x[:2], random_rollout(length=4))
    return decoding, rows.replace(
        prompt=prompt,
        prompt_mask=valid,
        completion=completion.tokens,
        scored=np.ones((2, 4), bool),
        commit_step=completion.commit_step,
        extras=completion.extras,
    )


@pytest.mark.parametrize(
    ('name', 'settings'),
    [
        ('d2', {'segments': 3}),
        ('tracerl', {'shrink': 2}),
        ('agrpo', {'states': 24, 'importance': 'uniform'}),
    ],
)
def test_states_of_a_rollout_on_the_grid_reach_its_last_step(sampled, name, settings):
    decoding, rollout = sampled
    assert np.asarray(rollout.commit_step).max() == 5  # though there are sampling.steps 4
    batching = Batching(
        compact=False,
        prompts=1,
        group_size=2,
        inner_updates=1,
        generation_batch=0,
        microbatch=2,
        draws_per_pass=0,
    )
    corruption = Corruption('full', 1, BLOCK, from_prompt=True)
    method = REGISTRY[name]
    objective = method.build(method.settings(**settings), Protocol(corruption, decoding, batching))

    @jax.jit
    def draw(rows):
        return corrupt(objective.corruption, rows, moments(0, rows, jnp.int32(0), jnp.int32(0)))

    target = np.asarray(draw(rollout).target)
    assert target.shape[1] == objective.draws
    assert target.any(axis=1).all()
    if name != 'agrpo':  # which draws states, also twice
        assert (target.sum(axis=1) == 1).all()


def test_every_reader_of_shifted_logits_gets_the_prediction_of_its_position(policy):
    """Dream predicts a position one to the left of it; padding and a cut change nothing."""
    policy, variables = policy
    config = dataclasses.replace(policy.config, visible_block=0)
    shifted = dataclasses.replace(policy, config=dataclasses.replace(config, shift_logits=True))
    tokens = np.concatenate([PROMPT, np.where([1, 0, 1, 1, 0], MASK, COMPLETION)])[None]
    raw = logits_of(config, variables, tokens)
    prompt = np.concatenate([[5, 5], PROMPT])[None]
    valid = np.array([[False, False, True, True, True]])
    logits = jax.jit(shifted.completion_logits)(variables, prompt, valid, tokens[:, 3:])
    assert_allclose(logits, raw[:, 2:-1], atol=1e-5)
