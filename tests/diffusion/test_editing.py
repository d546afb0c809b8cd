"""Samplers that edit: against plain loops, and their law against enumeration."""

from collections import defaultdict
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.diffusion import sampling
from spg_jax.diffusion.samplers.editing import replay_edits, state_in_block
from spg_jax.diffusion.sampling import SamplingConfig, generate
from tests.diffusion.test_law_of_completions import MASK as NO_TOKEN
from tests.diffusion.test_law_of_completions import (
    SYMBOLS,
    assert_frequencies,
    completions,
    law_at,
    random_table,
)
from tests.diffusion.test_law_of_completions import VOCABULARY as IDS
from tests.diffusion.test_sampling import (
    ALLOWED,
    EOS,
    MASK,
    VOCABULARY,
    Toy,
    logits_in_numpy,
    prompts,
)

pytestmark = pytest.mark.numerical

CHOICES = [v for v in range(VOCABULARY) if ALLOWED[v] and v != MASK]
# The toy is sure of little: with these thresholds both rules edit some tokens and leave others.
SURE = {'llada21': {'threshold': 0.5, 'edit_threshold': 0.3, 'post_steps': 3}}
DOUBTS = {'autoedit': {'edit_threshold': 0.9, 'keep_threshold': 1e-5, 'edit_rounds': 3}}
OPTIONS = SURE | DOUBTS


def config_of(name, **options):
    options = {'length': 8, 'steps': 8, 'block_length': 4, 'temperature': 1.0} | options
    return SamplingConfig(sampler=name, **OPTIONS[name], **options)


class Round:
    """What one pass says about a block, in float64: tokens drawn and probabilities."""

    def __init__(self, toy, sequence, start, key, step, config):
        logits = logits_in_numpy(toy, sequence)[start : start + config.block_length]
        noise = jax.random.gumbel(jax.random.fold_in(key, 2 * step), logits.shape)
        prob = np.exp(logits - logits.max(-1, keepdims=True))
        self.prob = prob / prob.sum(-1, keepdims=True)
        noisy = logits + config.temperature * np.asarray(noise)
        self.token = [max(CHOICES, key=row.__getitem__) for row in noisy]
        self.best = [max(CHOICES, key=row.__getitem__) for row in logits]
        allowed = logits[:, CHOICES]
        law = np.exp((allowed - allowed.max(-1, keepdims=True)) / (config.temperature or 1.0))
        law /= law.sum(-1, keepdims=True)
        drawn = [CHOICES.index(token) for token in self.token]
        self.log_prob = np.log(law[range(len(law)), drawn]) * (config.temperature > 0)

    def replaces(self, i, token, config):
        best = self.best[i]
        return best != token and self.prob[i, best] > config.edit_threshold


def plain_loop(toy, prompt, key, config):
    """Draft, commit steps, writes and final tokens of one row, by plain lists.

    A write is (position, round, token, log-probability), a round that of the record.
    """
    first, size = len(prompt), config.block_length
    sequence = [*prompt, *[MASK] * config.length]
    draft, commit_step, writes, states = {}, [-1] * config.length, [], []
    steps = config.steps // config.blocks
    after = config.sampler == 'autoedit'
    for block in range(config.blocks):
        start = first + block * size
        if config.stop_early and EOS in sequence[first:start]:
            sequence[start:] = [EOS] * (len(sequence) - start)
            break
        turn = post = 0
        while True:
            masked = [i for i in range(size) if sequence[start + i] == MASK]
            if not masked and (after or post == config.post_steps):
                break
            post += not masked
            number = block * (steps if after else steps + config.post_steps) + turn
            view = Round(toy, sequence, start, key, number, config)
            least = -(-len(masked) // (steps - turn)) if masked else 0
            if after:  # drafts by low confidence
                order = sorted(masked, key=lambda i: -view.prob[i, view.token[i]])
                sure = 0
            else:
                order = sorted(masked, key=lambda i: -view.prob[i, view.best[i]])
                sure = sum(view.prob[i, view.best[i]] > config.threshold for i in masked)
            there = [i for i in range(size) if i not in masked]
            edited = [i for i in there if view.replaces(i, sequence[start + i], config)]
            edited = [] if after else edited
            for i in [*order[: max(sure, least)], *edited]:
                place = start + i - first
                if i in edited:
                    writes.append((place, turn, view.token[i], view.log_prob[i]))
                else:
                    draft[place], commit_step[place] = view.token[i], block * steps + turn
                sequence[start + i] = view.token[i]
            states.append((block, turn, sequence[first:]))
            if not masked and not edited:
                break
            turn += 1
    for place in range(config.length):
        draft.setdefault(place, EOS)
    for number in range(config.edit_rounds if after else 0):
        now = []
        for block in range(config.blocks):
            step = config.steps + number * config.blocks + block
            view = Round(toy, sequence, first + block * size, key, step, config)
            for i in range(size):
                token = sequence[first + block * size + i]
                doubtful = view.prob[i, token] < config.keep_threshold
                if config.temperature == 0:
                    doubtful = doubtful and view.best[i] != token
                if doubtful or view.replaces(i, token, config):
                    now.append((block * size + i, number, view.token[i], view.log_prob[i]))
        for place, _, token, _ in now:
            sequence[first + place] = token
        writes += now
        if not now:
            break
    return [draft[i] for i in range(config.length)], commit_step, writes, states, sequence[first:]


@pytest.fixture(scope='module')
def decoded():
    """Completions of the toy by sampler, temperature and the bias of EOS, compiled once each."""
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    kept = {}

    def decode(name, temperature, bias):
        if (name, temperature, bias) not in kept:
            config = config_of(name, temperature=temperature)
            completion = Toy(eos_bias=bias).generate(tokens, mask, keys, config)
            kept[name, temperature, bias] = config, jax.tree.map(np.asarray, completion)
        return kept[name, temperature, bias]

    return decode


# Without noise llada21 is in tests/models/test_families.py, which has its published completions.
CASES = [('llada21', 1.0, 1.0), ('autoedit', 0.0, -20.0), ('autoedit', 1.0, 1.0)]


@pytest.mark.parametrize(('name', 'temperature', 'bias'), CASES)
def test_tokens_and_records_are_those_of_the_plain_loop(decoded, name, temperature, bias):
    config, completion = decoded(name, temperature, bias)
    toy = Toy(eos_bias=bias)
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    kept = written = 0
    for row in range(len(tokens)):
        prompt = tokens[row][mask[row]].tolist()
        draft, commit_step, writes, states, final = plain_loop(toy, prompt, keys[row], config)
        edits = np.full((config.length, config.edits_recorded), -1)
        log_prob = np.zeros(edits.shape)
        for place, number, token, value in writes:
            edits[place, number], log_prob[place, number] = token, value
        extras = {name: x[row] for name, x in completion.extras.items()}
        is_there = np.array(commit_step) >= 0
        assert_array_equal(completion.tokens[row], final)
        assert_array_equal(completion.commit_step[row], commit_step)
        assert_array_equal(extras['draft'], draft)
        assert_array_equal(extras['edits'], edits)
        assert_allclose(extras['edit_log_prob'], log_prob, rtol=1e-4, atol=1e-5)
        assert MASK not in completion.tokens[row] and MASK not in edits
        if name == 'autoedit':
            replayed = replay_edits(jnp.asarray(draft), jnp.asarray(edits))
            assert_array_equal(replayed.written[-1], final)
            assert_array_equal(replayed.tokens[0], draft)
            assert_array_equal(replayed.target, edits.T >= 0)
        else:
            for block, turn, after in states:
                state = state_in_block(
                    extras['draft'], edits, np.array(commit_step), block, turn + 1, config, MASK
                )
                assert_array_equal(np.where(is_there, state, MASK), np.where(is_there, after, MASK))
        kept += (edits < 0).all(1).sum()
        written += len(writes)
    assert kept and written > len(tokens)  # Some tokens are edited, and others stay.


@pytest.mark.parametrize('name', OPTIONS)
def test_a_row_alone_gets_what_it_gets_beside_others_and_given_tokens_stay(decoded, name):
    config, completion = decoded(name, 1.0, 1.0)
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    toy = Toy(eos_bias=1.0)
    opening = np.full((2, config.length), MASK)
    opening[1, [1, 6]] = 5, 9

    @jax.jit
    def generate_two(tokens, mask, keys):
        return generate(
            toy.in_window, toy.unembed, tokens, mask, keys, config, MASK, EOS, ALLOWED,
            opening=jnp.asarray(opening),
        )  # fmt: skip

    rows = np.array([4, 0])
    pair = generate_two(tokens[rows], mask[rows], keys[rows])
    assert_array_equal(pair.tokens[0], completion.tokens[4])
    assert_array_equal(pair.extras['edits'][0], completion.extras['edits'][4])
    assert pair.tokens[1][np.array([1, 6])].tolist() == [5, 9]
    assert (pair.extras['edits'][1][np.array([1, 6])] < 0).all()


def test_rows_may_be_in_different_blocks(decoded):
    """As in slots: one row has ended, and the others are in their first or second block."""
    config, completion = decoded('llada21', 1.0, 1.0)
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    toy = Toy(eos_bias=1.0)

    @jax.jit
    def begun(block):
        return sampling.begin(tokens, mask, keys, config, MASK, VOCABULARY, block)

    @jax.jit
    def advance(carry):
        decoder = sampling.decoder_of(
            toy.in_window, toy.unembed, mask, keys, config, MASK, EOS, ALLOWED
        )
        return decoder.advance(carry)

    start = begun(np.zeros(5, np.int32))
    late = np.array([True, False, True, False, False])
    choose = lambda x, y: np.where(late.reshape(-1, *(1,) * (x.ndim - 1)), x, y)  # noqa: E731
    carry = jax.tree.map(choose, start, advance(start))
    assert set(carry.block.tolist()) >= {0, 1}
    for _ in range(2):
        carry = advance(carry)
    ended = jax.jit(lambda carry: sampling.completion_of(carry, EOS, config))(carry)
    assert_array_equal(ended.tokens, completion.tokens)
    assert_array_equal(ended.extras['edits'], completion.extras['edits'])


# ---- The law of a draft and its edits, in which a table gives the logits of each state.


def masses(logits):
    prob = np.exp(logits.astype(float))
    return prob / prob.sum(-1, keepdims=True)


def walk(table, config, state, turn, post, record, law, recorded):
    """Yields (record, probability, product of the recorded ones) of all ways to go on."""
    masked = [i for i, token in enumerate(state) if token == NO_TOKEN]
    logits = table[sum(token * IDS**i for i, token in enumerate(state))]
    belief, laws = masses(logits), [law_at(x, config) for x in logits]
    best = logits[:, :SYMBOLS].argmax(-1)
    after = config.sampler == 'autoedit'
    if masked or not after:
        sure = [i for i in masked if belief[i, best[i]] > config.threshold]
        order = sorted(masked, key=lambda i: -belief[i, best[i]])
        commits = sorted({*sure, *order[: -(-len(masked) // max(config.steps - turn, 1))]})
        places = [i for i in range(len(state)) if i not in masked] if not after else []
        edits = [
            i for i in places if best[i] != state[i] and belief[i, best[i]] > config.edit_threshold
        ]
        if after:  # by random positions, one a step
            choices = [(1 / len(masked), [i], []) for i in masked]
        else:
            choices = [(1.0, commits, edits)]
        ends = not masked and (not edits or post == config.post_steps)
    else:
        edits = [
            i
            for i in range(len(state))
            if belief[i, state[i]] < config.keep_threshold
            or (best[i] != state[i] and belief[i, best[i]] > config.edit_threshold)
        ]
        choices = [(1.0, [], edits)]
        ends = not edits or post == config.edit_rounds
    if ends:
        yield (tuple(state), tuple(record)), law, recorded
        return
    for chance, commits, edits in choices:
        for symbols in product(range(SYMBOLS), repeat=len(commits) + len(edits)):
            changed, own, notes = list(state), 1.0, []
            for i, symbol in zip([*commits, *edits], symbols, strict=True):
                own *= laws[i][symbol]
                changed[i] = symbol
                number = post if after else turn
                notes.append((i, number, symbol) if i in edits else (i, -1, symbol))
            if own > 0.0:
                yield from walk(
                    table, config, changed, turn + 1, post + (not masked), [*record, *notes],
                    law * chance * own, recorded * own,
                )  # fmt: skip


def outcomes_of(completion):
    """(tokens, writes) of each row, a write being (position, round, token), -1 the draft's."""
    draft, edits = completion.extras['draft'], completion.extras['edits']
    for tokens, first, row in zip(completion.tokens, draft, edits, strict=True):
        writes = {(i, -1, int(token)) for i, token in enumerate(first)}
        writes |= {(int(i), int(r), int(row[i, r])) for i, r in np.argwhere(row >= 0)}
        yield tuple(tokens.tolist()), frozenset(writes)


@pytest.mark.parametrize(
    'config',
    [
        SamplingConfig(
            2, 2, 2, 1.0, sampler='llada21', threshold=0.6, edit_threshold=0.5, post_steps=2,
            stop_early=False, records=('log_prob',),
        ),
        SamplingConfig(
            2, 2, 2, 2.0, sampler='autoedit', commit='random', edit_threshold=0.6,
            keep_threshold=0.3, edit_rounds=2, top_k=2, stop_early=False, records=('log_prob',),
        ),
    ],
    ids=lambda config: config.sampler,
)  # fmt: skip
def test_the_law_of_draft_and_edits_is_the_product_of_what_is_recorded(config, monkeypatch):
    table = random_table(2)
    assert config.exact_law
    outcomes, products = defaultdict(float), {}
    ways = 2 if config.commit == 'random' else 1  # the positions of a draft in two orders
    for (tokens, record), law, recorded in walk(table, config, [NO_TOKEN] * 2, 0, 0, [], 1.0, 1.0):
        outcome = tokens, frozenset(record)
        outcomes[outcome] += law
        products.setdefault(outcome, []).append((law, recorded))
    assert_allclose(sum(outcomes.values()), 1.0, rtol=1e-9)
    assert any(number >= 0 for _, writes in outcomes for _, number, _ in writes)
    for law, recorded in (pair for pairs in products.values() for pair in pairs):
        assert_allclose(law, recorded / ways, rtol=1e-9)
    completion = jax.tree.map(np.asarray, completions(table, config))
    drawn = list(outcomes_of(completion))
    monkeypatch.setattr(
        'tests.diffusion.test_law_of_completions.outcomes_of', lambda completion: drawn
    )
    assert_frequencies(completion, {outcome: (law,) for outcome, law in outcomes.items()})
    log_prob = completion.extras['log_prob'].sum(-1) + completion.extras['edit_log_prob'].sum(
        (1, 2)
    )
    for outcome, value in list(zip(drawn, log_prob, strict=True))[:400]:
        expected = np.log([recorded for _, recorded in products[outcome]])
        assert np.abs(expected - value).min() < 1e-4


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'edit_threshold': 1.5}, r'sampling.edit_threshold is 1.5; use a probability'),
        ({'keep_threshold': -0.1}, r'sampling.keep_threshold is -0.1; use a probability'),
        ({'post_steps': -1}, 'sampling.post_steps is -1; use 0 or more rounds'),
        ({'edit_rounds': 0}, 'sampling.edit_rounds is 0; use 1 or more rounds'),
        ({'sampler': 'autoedit', 'commit': 'llada21'}, "sampling.commit is 'llada21', which edits"),
        ({'commit': 'autoedit'}, "sampling.commit is 'autoedit', which edits"),
        ({'sampler': 'llada21', 'cache': 'dual'}, "use sampling.cache ''"),
        ({'sampler': 'llada21', 'threshold': 0.0}, 'sampling.threshold is 0.0'),
    ],
)
def test_numbers_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        SamplingConfig(4, 4, 4, 1.0, **options)
    assert '\n' not in str(error.value)
