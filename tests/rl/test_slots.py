"""Generation in slots gives every row what it gets in a whole batch, and rollouts stay the same."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from spg_jax.assembly import assemble
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.diffusion.samplers import decoder
from spg_jax.diffusion.sampling import SamplingConfig, compacted_sizes
from spg_jax.rl import gap, slots
from spg_jax.rl.collection import make_generate
from spg_jax.rl.evaluator import Evaluation, Evaluator
from spg_jax.rl.rollout import empty_rollout
from tests.meshes import mesh_of
from tests.parameters import random_params

ROWS = 8
# Rows, slots, the shares of `decoder.SHARES`, blocks, whether layers are unrolled, and how the
# setting differs from one batch by low confidence. With fewer slots than rows others move in, and
# with as many the batch shrinks; the state of a cache and of a rule has to follow. The rollout of
# tests/rl/test_rollout.py has rows that move in without a cache, and the evaluation below has a
# batch of such rows that shrinks. Under the second setting row 0, which comes twice, ends in the
# first block, so that the batch shrinks to the other two, which move. Each size of a batch is a
# program, in which the prefix cache has a branch for each block. In a block under way batches
# shrink as well, and with them their caches, which are one for each layer where these are unrolled.
REMASK = {'sampler': 'remask', 'threshold': 0.5}
THRESHOLD = {'sampler': 'threshold', 'threshold': 0.1}
KINDS = [
    (np.arange(ROWS), 2, (1, 2), 4, True, REMASK | {'cache': 'dual', 'refresh': 2}),
    (np.array([0, 1, 0, 3]), 4, (1, 2), 2, False, THRESHOLD | {'cache': 'prefix'}),
]


def arguments(policy):
    """Parameters, with which rows end in different blocks, and eight prompts."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, 24, (ROWS, 4)).astype(np.int32)
    mask = np.arange(4)[None, :] >= np.arange(ROWS)[:, None] % 3
    keys = jax.random.split(jax.random.key(3), ROWS)
    return {'params': random_params(policy.model)}, prompt, mask, keys


def joined(parts):
    """The parts of a stream as one Completion, in the order of rows."""
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    cut = [
        jax.tree.map(lambda x, rows=rows: np.asarray(x)[: len(rows)], part) for rows, part in parts
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[order], *cut)


@pytest.fixture
def sizes(monkeypatch):
    """The sizes of the batches that blocks are decoded in, one entry for each program."""
    sizes, make = [], slots.sampling.decoder_of

    def watching(hidden, unembed, prompt_mask, *rest, **options):
        sizes.append(len(prompt_mask))
        return make(hidden, unembed, prompt_mask, *rest, **options)

    monkeypatch.setattr(slots.sampling, 'decoder_of', watching)
    return sizes


@pytest.mark.parametrize(('chosen', 'number', 'shares', 'blocks', 'unrolled', 'change'), KINDS)
def test_rows_get_in_slots_what_they_get_in_a_whole_batch(
    policy, sizes, monkeypatch, chosen, number, shares, blocks, unrolled, change
):
    """A batch of all rows shrinks with them; one that others move into shrinks at its end."""
    monkeypatch.setattr(decoder, 'SHARES', shares)
    if unrolled:
        model = dataclasses.replace(policy.config, scan_unroll=policy.config.layers)
        policy = dataclasses.replace(policy, config=model)
    config = SamplingConfig(4 * blocks, 4 * blocks, 4, 2.0, records=('log_prob',), **change)
    variables, *rows = arguments(policy)
    rows = [x[chosen] for x in rows]
    count = len(rows[0])
    with jax.set_mesh(mesh_of()):  # without which the first block would be a program of its own
        expected = make_generate(policy, config)(variables, *rows)
        sizes.clear()
        parts = list(slots.make_stream(policy, config, number)(variables, *rows))
    assert sorted(np.concatenate([index for index, _ in parts]).tolist()) == list(range(count))
    assert len(parts) >= min(3, blocks)  # rows ended at different times
    assert sizes[0] == number and set(sizes) == set(compacted_sizes(number))
    completion = joined(parts)
    assert_array_equal(completion.tokens, expected.tokens)
    assert_array_equal(completion.commit_step, expected.commit_step)
    log_prob = completion.extras['log_prob']
    np.testing.assert_allclose(log_prob, expected.extras['log_prob'], atol=2e-6)


@pytest.mark.parametrize(
    'change', [{}, THRESHOLD | {'cache': 'dual'}, {'guidance': 0.5, 'records': ('influence',)}]
)
@pytest.mark.parametrize('number', [4, 8])
def test_a_group_shares_the_first_pass_and_its_rows_stay_what_they_are(
    policy, monkeypatch, change, number
):
    """Two rows to a prompt, with keys of their own: in one batch, or where others move in."""
    passes, functions_of = [], slots.functions_of

    def watching(policy, variables):
        hidden, unembed, cached = functions_of(policy, variables)

        def watched(read):
            return lambda tokens, *rest: (passes.append(len(tokens)), read(tokens, *rest))[1]

        return watched(hidden), unembed, dataclasses.replace(cached, read=watched(cached.read))

    monkeypatch.setattr(slots, 'functions_of', watching)
    config = SamplingConfig(8, 8, 4, 2.0, **change)
    variables, prompt, mask, keys = arguments(policy)
    rows = prompt[np.arange(ROWS) // 2], mask[np.arange(ROWS) // 2], keys
    with jax.set_mesh(mesh_of()):
        expected = make_generate(policy, config)(variables, *rows)
        parts = list(slots.make_stream(policy, config, number, group_size=2)(variables, *rows))
    assert passes[0] == number // 2  # A pass is noted when its program is made.
    assert number in passes
    completion = joined(parts)
    assert_array_equal(completion.tokens, expected.tokens)
    assert_array_equal(completion.commit_step, expected.commit_step)
    for name, values in expected.extras.items():
        np.testing.assert_allclose(completion.extras[name], values, atol=2e-6)
    assert len(np.unique(completion.tokens[:2], axis=0)) == 2  # A group has several completions.


def test_the_sizes_of_a_batch_that_shrinks():
    assert compacted_sizes(8) == (1, 2, 4, 8)
    assert compacted_sizes(128) == (16, 32, 64, 128) and compacted_sizes(1) == (1,)


def test_an_evaluation_in_slots_is_the_evaluation_in_whole_batches(policy, sizes, monkeypatch):
    """Five problems with two samples each: ten rows, in batches of four or in four slots."""
    monkeypatch.setattr(decoder, 'SHARES', (1, 4))
    decoding = SamplingConfig(16, 16, 4, 2.0)
    evaluation = Evaluation((decoding,), 16, 2.0, 2, 4, False, prompt_lengths=(4,), seed=0)
    task = SimpleNamespace(prompt=lambda example: f'w{example["index"]} w3', prefill='')
    tokenizer = WordTokenizer([f'w{number}' for number in range(21)])
    problems = [{'index': index} for index in range(5)]
    variables, *_ = arguments(policy)
    texts = []
    with jax.set_mesh(mesh_of()):
        for compact in (False, True):
            changed = dataclasses.replace(evaluation, compact=compact)
            evaluator = Evaluator(policy, task, tokenizer, changed, mesh_of())
            texts.append(evaluator.texts(variables, problems, decoding, samples=2))
    assert texts[1] == texts[0] and len(texts[0]) == 10
    assert set(sizes) == {4, 1}  # others move in, and then the batch shrinks
    assert len({len(text.split()) // 4 for text in texts[0]}) > 1  # rows end in different blocks


def sampled(policy, config, mesh):
    """A rollout with the records of its sampler, and the parameters that sampled it."""
    variables, prompt, mask, keys = arguments(policy)
    completion = make_generate(policy, config)(variables, prompt, mask, keys)
    rollout = empty_rollout(8, 4, config.length, mesh).replace(
        prompt=prompt,
        prompt_mask=mask,
        completion=completion.tokens,
        commit_step=completion.commit_step,
        scored=np.asarray(completion.commit_step) >= 0,
        example_id=np.arange(8, dtype=np.uint32),
        extras=completion.extras,
    )
    return variables, rollout


def test_the_gap_is_rounding_where_the_sampler_is_exact_and_seen_where_it_is_not(policy, config):
    batching = dataclasses.replace(assemble(config).batching, microbatch=4)
    exact = SamplingConfig(12, 12, 4, 1.5, 'entropy', records=('log_prob',), top_k=9, top_p=0.9)
    mesh = mesh_of()
    # The law that is scored does not depend on how the sampler commits.
    gap_of = gap.make_gap(policy, exact, batching, 0)
    with jax.set_mesh(mesh):
        decoding = dataclasses.replace(exact, sampler='threshold', threshold=0.2)
        variables, rollout = sampled(policy, decoding, mesh)
        total, count = gap_of(variables, rollout, 3)['sampling_gap']
        assert count >= 8 and total / count <= 1e-5
        # Half a nat more in every record is half a nat more of a gap.
        shifted = rollout.replace(extras={'log_prob': rollout.extras['log_prob'] + 0.5})
        total, count = gap_of(variables, shifted, 3)['sampling_gap']
        assert abs(total / count - 0.5) < 1e-4
    assert gap.make_gap(policy, dataclasses.replace(exact, records=()), batching, 0) is None
    assert gap.make_gap(policy, dataclasses.replace(exact, temperature=0.0), batching, 0) is None
