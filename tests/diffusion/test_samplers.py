"""Samplers that commit several tokens a step against plain loops, and caches against the model."""

import dataclasses
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.diffusion import samplers
from spg_jax.diffusion.samplers.rules import View, commitment
from spg_jax.diffusion.sampling import CachedModel, SamplingConfig, generate
from spg_jax.diffusion.token_law import likeliest
from spg_jax.models.policy import Policy
from spg_jax.models.transformer import TransformerConfig
from spg_jax.rl.collection import make_generate
from tests.diffusion.test_sampling import (
    ALLOWED,
    EOS,
    MASK,
    VOCABULARY,
    Counting,
    Toy,
    logits_in_numpy,
    passes_of,
    prompts,
)
from tests.parameters import random_params

pytestmark = pytest.mark.numerical

NEW = {
    'threshold': {'threshold': 0.5},
    'factor': {'factor': 1.2},
    'entropy_bounded': {'entropy_bound': 1.5},
    'remask': {'threshold': 0.7, 'remasks': 2},
}


def config_of(name, **options):
    options = {'length': 12, 'steps': 12, 'block_length': 4, 'temperature': 1.0} | options
    return SamplingConfig(sampler=name, records=('confidence',), **NEW[name], **options)


def plain_loop(toy, prompt, key, config):
    """Tokens, commit steps and confidences of one row, by plain lists in float64."""
    first, block_length = len(prompt), config.block_length
    sequence = [*prompt, *[MASK] * config.length]
    commit_step, sureness = [-1] * config.length, [0.0] * config.length
    steps = config.steps // (config.length // block_length)
    for block in range(config.length // block_length):
        start = first + block * block_length
        if config.stop_early and EOS in sequence[first:start]:
            sequence[start:] = [EOS] * (len(sequence) - start)
            break
        taken = 0
        for within in range(steps):
            masked = [i for i in range(start, start + block_length) if sequence[i] == MASK]
            if not masked:
                break
            step = block * steps + within
            logits = logits_in_numpy(toy, sequence)
            noise_key = jax.random.fold_in(key, 2 * step)
            gumbel = np.asarray(jax.random.gumbel(noise_key, (block_length, VOCABULARY)))
            choices = [v for v in range(VOCABULARY) if ALLOWED[v] and v != MASK]
            token, drawn, largest, spread = {}, {}, {}, {}
            for i in masked:
                probability = np.exp(logits[i] - logits[i].max())
                probability /= probability.sum()
                noisy = logits[i] + config.temperature * gumbel[i - start]
                token[i] = max(choices, key=noisy.__getitem__)
                drawn[i] = probability[token[i]]
                largest[i] = max(probability[v] for v in choices)
                spread[i] = -(probability * np.log(probability)).sum()
            least = -(-len(masked) // (steps - within))
            if config.sampler == 'threshold':
                order = sorted(masked, key=lambda i: -largest[i])
                number = sum(value > config.threshold for value in largest.values())
            elif config.sampler == 'factor':
                order = sorted(masked, key=lambda i: -largest[i])
                number = 0
                while number < len(order) and (
                    (number + 2) * (1 - largest[order[number]]) < config.factor
                ):
                    number += 1
            elif config.sampler == 'entropy_bounded':
                order = sorted(masked, key=spread.__getitem__)
                number, total = 0, 0.0
                while number < len(order) and total <= config.entropy_bound:
                    total += spread[order[number]]
                    number += 1
            else:
                order, number = sorted(masked, key=lambda i: -drawn[i]), 0
            back = None
            if config.sampler == 'remask' and within < steps - 1 and taken < config.remasks:
                there = [i for i in range(start, start + block_length) if i not in masked]
                doubtful = [i for i in there if sureness[i - first] <= config.threshold]
                back = min(doubtful, key=lambda i: sureness[i - first], default=None)
            for i in order[: max(number, least)]:
                sequence[i], commit_step[i - first] = token[i], step
                sureness[i - first] = drawn[i]
            if back is not None:
                sequence[back], commit_step[back - first] = MASK, -1
                taken += 1
    return sequence[first:], commit_step, sureness


@pytest.mark.parametrize(
    ('name', 'temperature', 'steps', 'bias'),
    [
        *((name, 1.0, 12, 1) for name in NEW),
        *((name, 0.0, 6, -20) for name in ('factor', 'remask')),
    ],
)
def test_each_rule_is_the_plain_loop(name, temperature, steps, bias):
    """Without noise, and with a schedule of two a step, where the order is by each confidence."""
    toy = Counting(eos_bias=bias)
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    config = config_of(name, temperature=temperature, steps=steps)
    completion = toy.generate(tokens, mask, keys, config)
    committed = np.asarray(completion.commit_step)
    for row in range(len(tokens)):
        prompt = tokens[row][mask[row]].tolist()
        expected, step, sureness = plain_loop(toy, prompt, keys[row], config)
        assert_array_equal(completion.tokens[row], expected)
        assert_array_equal(committed[row], step)
        sureness = np.where(committed[row] >= 0, sureness, 0)
        assert_allclose(completion.extras['confidence'][row], sureness, rtol=1e-4)
    if steps == 12:  # Some step commits more than one, be it what was taken back.
        assert any(len(set(row[:4])) < 4 for row in committed.tolist())


def test_the_likeliest_id_is_the_first_of_the_highest_scores():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 3, 9)).astype(np.float32)  # with many ties
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    scores[:5] = -np.inf
    scores[5:10, 1, 4:] = np.nan  # which counts as the highest for NumPy as well
    scores[10:15, 2] = np.inf
    ids = jax.jit(likeliest)(scores)
    assert ids.dtype == jnp.int32
    assert_array_equal(ids, scores.argmax(-1))


def test_a_row_alone_gets_what_it_gets_beside_slower_rows():
    """By the rule that keeps most of a row; the plain loop knows of one row by every rule."""
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(5), len(tokens))
    toy, config = Counting(eos_bias=1.0), config_of('remask')
    batch = toy.generate(tokens, mask, keys, config)
    for row in (0, 4):
        copies = np.full(len(tokens), row)
        alone = toy.generate(tokens[copies], mask[copies], keys[copies], config)
        assert_array_equal(alone.tokens[0], batch.tokens[row])
        assert_array_equal(alone.commit_step[0], batch.commit_step[row])


def test_what_is_taken_back_is_committed_by_the_last_step_of_every_schedule():
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(5), len(tokens))
    toy, config = Counting(eos_bias=-20.0), config_of('remask', schedule='timesteps')
    config = dataclasses.replace(config, threshold=1.0, remasks=9)  # No token is ever sure.
    completion = toy.generate(tokens, mask, keys, config)
    assert np.all(np.asarray(completion.tokens) != MASK)
    assert np.all(np.asarray(completion.commit_step) >= 0)


def test_a_block_ends_with_its_last_token_and_not_with_its_last_step():
    sure, unsure = Counting(), Counting(hidden_bias=60.0)  # of every token, or of none
    sure.bias[5] = 60.0
    for toy, passes in ((sure, 3), (unsure, 12)):
        assert len(passes_of(toy, config_of('threshold'))[1]) == passes


@pytest.mark.parametrize(('name', 'bias'), [('threshold', 1.0), ('remask', 3.0)])
def test_rows_whose_block_is_finished_leave_the_batch_until_the_others_have(name, bias):
    """A pass has the smallest of the sizes 1, 2, 3 and 5 that holds the rows with work to do, which
    the steps of a whole batch tell."""
    toy, config = Counting(eos_bias=bias), config_of(name)
    whole, of_whole = passes_of(toy, config)
    compacted, of_compacted = passes_of(toy, config, compact=True)
    assert_array_equal(compacted.tokens, whole.tokens)
    assert_array_equal(compacted.commit_step, whole.commit_step)
    confidence = compacted.extras['confidence']
    assert_allclose(confidence, whole.extras['confidence'], rtol=1e-5)
    block, turn = np.divmod(np.asarray(whole.commit_step), 4)  # [5, 12]
    last = np.stack([np.where(block == each, turn, -1).max(1) for each in range(3)], 1)  # [5, 3]
    still_open = [(last[:, each] >= step).sum() for each in range(3) for step in range(4)]
    expected = [min(size for size in (1, 2, 3, 5) if size >= n) for n in still_open if n]
    assert of_compacted == expected and len(set(expected)) > 1
    assert of_whole == [5] * len(expected)


@pytest.fixture(scope='module')
def commitments():
    """What each rule commits where the schedule asks for 1, 3 or 5 positions, [3, 6].

    The logits are NaN, infinite or equal in some positions.
    """
    logits = np.random.default_rng(1).normal(size=(6, 7)).astype(np.float32)
    logits[0], logits[1], logits[2, 3] = np.nan, -np.inf, 1e30

    @jax.jit
    def commitments(count):
        view = View(
            logits=jnp.asarray(logits),
            choosable=jnp.maximum(jnp.asarray(logits), jnp.finfo(jnp.float32).min),
            token=jnp.zeros(6, jnp.int32),
            masked=jnp.asarray(MASKED),
            count=count,
            scheduled=count,
            key=jax.random.key(0),
        )
        return {
            name: commitment(sampler, view, SamplingConfig(6, 6, 6, 1.0, sampler=name))
            for name, sampler in samplers.REGISTRY.items()
        }

    return jax.tree.map(lambda *x: np.stack(x), *map(commitments, map(np.int32, COUNTS)))


COUNTS = (1, 3, 5)
MASKED = np.array([True, True, True, False, True, True])


@pytest.mark.parametrize('name', samplers.REGISTRY)
def test_a_rule_commits_what_the_schedule_asks_for_and_only_masked_positions(name, commitments):
    """Whatever the logits are: NaN, infinite or equal."""
    for count, commit in zip(COUNTS, commitments[name], strict=True):
        assert commit.sum() >= count and not (commit & ~MASKED).any()


def test_rules_commit_as_many_as_the_formulas_say():
    """c = .95, .9, .6: 2 x .05 < 1, 3 x .1 < 1 and 4 x .4 > 1, so `factor` commits two at f = 1.

    `llada2` commits as many as the schedule has for the step, or all that are above its threshold.
    """
    confidence = np.array([0.6, 0.95, 0.9])
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1)).astype(np.float32)
    tokens, masked = np.zeros(3, np.int32), np.ones(3, bool)
    factors = {1.0: 2, 0.31: 2, 0.29: 1, 0.05: 1, 1.61: 3}
    schedules = {(0.99, 1): [1], (0.99, 2): [1, 2], (0.92, 2): [1, 2], (0.5, 1): [0, 1, 2]}

    def committed(logits, tokens, masked, scheduled, **options):
        view = View(logits, logits, tokens, masked, 1, scheduled, jax.random.key(0))
        config = SamplingConfig(3, 3, 3, 1.0, **options)
        return commitment(config.rule, view, config)

    @jax.jit
    def outcomes(*state):
        by_factor = [committed(*state, 1, sampler='factor', factor=f) for f in factors]
        by_schedule = [
            committed(*state, scheduled, sampler='llada2', threshold=threshold)
            for threshold, scheduled in schedules
        ]
        return by_factor, by_schedule

    by_factor, by_schedule = outcomes(logits, tokens, masked)
    assert [int(commit.sum()) for commit in by_factor] == [*factors.values()]
    assert [np.flatnonzero(commit).tolist() for commit in by_schedule] == [*schedules.values()]


OWN = """
import jax.numpy as jnp
from spg_jax.diffusion.samplers import Sampler

def right_to_left(view, config):
    return jnp.arange(len(view.token), dtype=jnp.float32)

def all_at_once(view, config):
    return right_to_left(view, config), jnp.ones_like(view.masked)

claimed = Sampler(right_to_left, looks_at_tokens=False)

class Made:
    def __call__(self, view, config):
        return right_to_left(view, config)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    tmp_path.joinpath('my_rules.py').write_text(OWN)
    yield 'my_rules'
    sys.modules.pop('my_rules', None)


def test_a_rule_of_a_user_is_named_by_its_path(own):
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    expected = [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8]
    config = SamplingConfig(12, 12, 4, 1.0, sampler=f'{own}.claimed')
    assert Toy().generate(tokens, mask, keys, config).commit_step[0].tolist() == expected
    assert config.exact_law
    config = SamplingConfig(12, 12, 4, 1.0, sampler=f'{own}.Made')  # It calls a plain function.
    assert not config.exact_law
    logits = jnp.zeros((4, 3))
    view = View(logits, logits, jnp.zeros(4, jnp.int32), jnp.ones(4, bool), 1, 1, keys[0])
    assert commitment(config.rule, view, config).tolist() == [False, False, False, True]
    config = SamplingConfig(12, 12, 4, 1.0, sampler=f'{own}.all_at_once')
    assert commitment(config.rule, view, config).tolist() == [True] * 4
    assert samplers.source_file(f'{own}.claimed').name == 'my_rules.py'
    assert samplers.source_file('threshold') is None
    for name, message in (('number', 'a int; use the path of a rule'), ('none', 'has no none')):
        with pytest.raises(ValueError, match=message) as error:
            SamplingConfig(12, 12, 4, 1.0, sampler=f'{own}.{name}')
        assert '\n' not in str(error.value)


# ---- Caches, with a real transformer.


LENGTH = 8


def policy_of(attention):
    """As on a CPU, layers are unrolled with folded heads: the last one then reads a block alone."""
    model = TransformerConfig(
        vocab_size=24, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48,
        scale_logits=True, attention=attention, scan_unroll=2 if attention == 'folded' else 1,
    )  # fmt: skip
    return Policy(model, mask_id=0, eos_id=1, allowed=np.arange(24) != 0)


def params_of(layers):
    """Parameters of two layers, the second of which adds nothing where there is one."""
    params = random_params(policy_of('einsum').model)
    if layers == 1:
        for name in ('attention_out', 'down'):
            kernel = params['layers'][name]['kernel']
            params['layers'][name]['kernel'] = kernel.at[1].set(0.0)
    return params


@cache
def decoder_of(attention='einsum', **options):
    """A function from numbers of layers and of rows to completions of prompts of unlike lengths."""
    config = SamplingConfig(
        LENGTH, LENGTH, 4, 1.0, sampler='threshold', threshold=0.2,
        records=('log_prob', 'confidence'), **options,
    )  # fmt: skip
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 24, (8, 6)), jnp.int32)
    mask = np.arange(6)[None, :] >= np.arange(8)[:, None] % 4
    keys = jax.random.split(jax.random.key(3), 8)
    generate = make_generate(policy_of(attention), config)

    def decode(layers, rows=np.arange(8)):  # noqa: B008
        return generate({'params': params_of(layers)}, tokens[rows], mask[rows], keys[rows])

    return decode


@cache
def exact(layers):
    """Completions without a cache."""
    return decoder_of()(layers)


# Each cache with the attention that its programs are compiled with.
CACHES = [('prefix', 'einsum'), ('dual', 'folded')]


def test_a_cache_that_is_refreshed_at_every_step_is_exact():
    """A refresh reads the whole row, whichever cache it fills."""
    cache, attention = CACHES[1]
    cached = decoder_of(attention, cache=cache, refresh=1)(2)
    assert_array_equal(cached.tokens, exact(2).tokens)
    assert_array_equal(cached.commit_step, exact(2).commit_step)
    # Sums are rounded otherwise than by the attention without a cache.
    assert_allclose(cached.extras['log_prob'], exact(2).extras['log_prob'], atol=1e-5)
    assert not SamplingConfig(12, 12, 4, 1.0, cache=cache, refresh=1).approximate


@pytest.mark.parametrize(('cache', 'attention'), CACHES)
def test_a_cache_is_exact_where_keys_depend_on_no_other_position(cache, attention):
    """In the only layer that adds something, keys and values are those of the token at their own
    position."""
    cached = decoder_of(attention, cache=cache, refresh=3)(1)
    assert_array_equal(cached.tokens, exact(1).tokens)
    assert_allclose(cached.extras['log_prob'], exact(1).extras['log_prob'], atol=1e-5)
    assert SamplingConfig(12, 12, 4, 1.0, cache=cache).approximate


@pytest.mark.parametrize(('cache', 'attention'), CACHES)
def test_a_cache_is_approximate_elsewhere_and_a_row_does_not_depend_on_its_neighbours(
    cache, attention
):
    decode = decoder_of(attention, cache=cache, refresh=3)
    cached = decode(2)
    log_prob = np.asarray(cached.extras['log_prob'])
    assert np.abs(log_prob - np.asarray(exact(2).extras['log_prob'])).max() > 1e-3
    # The first block begins with a refresh, so that its first step is exact.
    first = np.asarray(exact(2).commit_step) == 0
    assert first.any(axis=1).all() and not first.all()
    assert_array_equal(np.asarray(cached.commit_step) == 0, first)
    assert_array_equal(np.asarray(cached.tokens)[first], np.asarray(exact(2).tokens)[first])
    assert_allclose(log_prob[first], np.asarray(exact(2).extras['log_prob'])[first], atol=1e-5)
    alone = decode(2, np.full(8, 3))  # among copies of itself
    assert_array_equal(alone.tokens[0], cached.tokens[3])
    assert_allclose(alone.extras['log_prob'][0], log_prob[3], atol=1e-5)


def test_a_cache_needs_a_model_that_has_one():
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    config = SamplingConfig(4, 2, 2, 0.0, cache='dual')
    with pytest.raises(ValueError, match="sampling.cache is 'dual', but this model has none"):
        Toy().generate(tokens, mask, keys, config)


def test_a_dual_cache_reads_the_block_alone_between_refreshes():
    """Windows of 4 positions, and all 18 where a block begins or a refresh is due."""
    sizes = []

    def read(tokens, valid, cache, start, window):
        jax.debug.callback(partial(sizes.append, tokens.shape[1]))
        return window.cut(jax.nn.one_hot(tokens, 24)), cache

    tokens = jnp.full((2, 6), 5, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    config = SamplingConfig(12, 12, 4, 1.0, cache='dual', refresh=3, stop_early=False)
    model = CachedModel(lambda rows, length: jnp.zeros(()), lambda cache, index: cache, read)
    allowed = np.arange(24) > 0
    jax.jit(
        lambda: generate(
            None, lambda hidden: hidden, tokens, tokens > 0, keys, config, 0, 1, allowed, model
        )
    )()
    jax.effects_barrier()
    assert sizes == [18, 4, 4, 18] * 3
