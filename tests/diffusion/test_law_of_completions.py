"""The law of completions, by enumeration: which rule of commitment records it, and which does not.

The model is a table of random logits for each state of three positions over three symbols. Every
path of the sampler is walked by `walk`, which knows the rules from their words alone.
"""

from collections import Counter
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax.diffusion import token_law
from spg_jax.diffusion.sampling import SamplingConfig, generate

pytestmark = pytest.mark.numerical

SYMBOLS, EOS, MASK, VOCABULARY = 3, 3, 4, 5
ALLOWED = np.arange(VOCABULARY) < SYMBOLS
ROWS = 4_000


def random_table(length):
    """Logits [state, length, V], state being the tokens read as a number in base V."""
    rng = np.random.default_rng(3)
    return 1.5 * rng.normal(size=(VOCABULARY**length, length, VOCABULARY)).astype(np.float32)


def completions(table, config):
    """4000 completions after a prompt of one token."""
    length = config.length

    def hidden(tokens, valid, window):
        digits = VOCABULARY ** jnp.arange(length)
        state = (tokens[:, 1:] * digits[None, :]).sum(-1)
        return window.cut(jnp.pad(jnp.asarray(table)[state], ((0, 0), (1, 0), (0, 0))))

    prompt = jnp.zeros((ROWS, 1), jnp.int32)
    keys = jax.random.split(jax.random.key(1), ROWS)
    return jax.jit(
        lambda keys: generate(
            hidden, lambda x: x, prompt, prompt == 0, keys, config, MASK, EOS, ALLOWED
        )
    )(keys)


def law_at(logits, config):
    """Probabilities of the symbols: softmax(logits / T) after top-k and then top-p."""
    order = np.argsort(-logits[:SYMBOLS])[: config.top_k or SYMBOLS]
    prob = np.exp(logits[order].astype(float) / config.temperature)
    cumulated = np.cumsum(prob / prob.sum())
    order = order[: 1 + int((cumulated < config.top_p - 1e-9).sum())]
    law = np.zeros(SYMBOLS)
    law[order] = prob[: len(order)] / prob[: len(order)].sum()
    return law


def walk(
    table,
    config,
    tokens=None,
    steps=None,
    step=0,
    probability=1.0,
    recorded=1.0,
    bits=0.0,
    sureness=None,
    taken=0,
):
    """Yields ((tokens, steps), probability, product of the tokens' own, sum of their entropies).

    `sureness` holds the confidence of each committed token, and `taken` counts those taken back.
    """
    length = config.length
    tokens = tokens or (MASK,) * length
    steps = steps or (-1,) * length
    masked = [i for i in range(length) if tokens[i] == MASK]
    if not masked:
        yield (tokens, steps), probability, recorded, bits
        return
    logits = table[sum(token * VOCABULARY**i for i, token in enumerate(tokens))]
    laws = [law_at(x, config) for x in logits]
    belief = np.exp(logits.astype(float))
    belief /= belief.sum(-1, keepdims=True)
    count = -(-len(masked) // (config.steps - step))
    sureness = sureness or (None,) * length
    best = -np.sort(-belief[:, :SYMBOLS], axis=-1)

    def ranked(score):
        return tuple(sorted(sorted(masked, key=lambda i: -score[i])[:count]))

    # Every set of draws that matters, its probability, and the positions committed then.
    name = config.rule_name
    if name == 'random':
        chosen = list(combinations(masked, min(count, len(masked))))
        cases = [(1 / len(chosen), positions, None) for positions in chosen]
    elif name in ('low_confidence', 'remask'):
        cases = []
        for draws in product(range(SYMBOLS), repeat=len(masked)):
            drawn = dict(zip(masked, draws, strict=True))
            chance = np.prod([laws[i][token] for i, token in drawn.items()])
            confidence = {i: belief[i, token] for i, token in drawn.items()}
            cases.append((chance, ranked(confidence), drawn))
    elif name in ('threshold', 'factor', 'entropy_bounded'):
        cases = [(1.0, surest(name, masked, belief, best[:, 0], config, count), None)]
    else:
        negative_entropy = (belief * np.log(belief)).sum(-1)
        score = {
            'left_to_right': -np.arange(length),
            'entropy': negative_entropy,
            'margin': best[:, 0] - best[:, 1],
        }[name]
        cases = [(1.0, ranked(score), None)]
    for chance, positions, drawn in cases:
        choices = [[drawn[i]] if drawn else range(SYMBOLS) for i in positions]
        for symbols in product(*choices):
            own = np.prod([laws[i][x] for i, x in zip(positions, symbols, strict=True)])
            weight = chance if drawn else chance * own
            if weight == 0.0:
                continue
            after, when = list(tokens), list(steps)
            for i, symbol in zip(positions, symbols, strict=True):
                after[i], when[i] = symbol, step
            sure, back = list(sureness), taken
            if name == 'remask':
                for i, symbol in zip(positions, symbols, strict=True):
                    sure[i] = belief[i, symbol]
                doubtful = [i for i in range(length) if tokens[i] != MASK]
                doubtful = [i for i in doubtful if sure[i] <= config.threshold]
                if doubtful and step < config.steps - 1 and taken < config.remasks:
                    least = min(doubtful, key=sure.__getitem__)
                    after[least], when[least], back = MASK, -1, taken + 1
            spread = sum(-(p[p > 0] * np.log(p[p > 0])).sum() for p in (laws[i] for i in positions))
            yield from walk(
                table,
                config,
                tuple(after),
                tuple(when),
                step + 1,
                probability * weight,
                recorded * own,
                bits + spread,
                tuple(sure),
                back,
            )


def surest(name, masked, belief, best, config, count):
    """The positions that a rule commits which may be sure of more than `count` of them."""
    spread = -(belief * np.log(belief)).sum(-1)
    order = sorted(masked, key=lambda i: spread[i] if name == 'entropy_bounded' else -best[i])
    number = 0
    for n in range(1, len(order) + 1):
        last = order[n - 1]
        accepted = {
            'threshold': best[last] > config.threshold,
            'factor': (n + 1) * (1 - best[last]) < config.factor,
            'entropy_bounded': sum(spread[i] for i in order[:n]) - spread[last]
            <= config.entropy_bound,
        }[name]
        if accepted:
            number = n
    return tuple(sorted(order[: max(number, count)]))


def enumerated(table, config):
    """Outcome -> (probability, product, sum of entropies), summed over draws that are dropped."""
    outcomes = {}
    for outcome, probability, *rest in walk(table, config):
        previous = outcomes.get(outcome, (0.0,))[0]
        outcomes[outcome] = (previous + probability, *rest)
    return outcomes


def outcomes_of(completion):
    """(tokens, steps) of each row."""
    rows = np.stack([completion.tokens, completion.commit_step], axis=1).tolist()
    return [(tuple(tokens), tuple(steps)) for tokens, steps in rows]


def assert_frequencies(completion, outcomes):
    """Pearson's chi-square within five standard deviations; rare outcomes count as one."""
    found = Counter(outcomes_of(completion))
    assert found.keys() <= outcomes.keys()
    counts = np.array([found[name] for name in outcomes])
    expected = ROWS * np.array([each[0] for each in outcomes.values()])
    assert_allclose(expected.sum(), ROWS, rtol=1e-9)
    rare = expected < 5
    cells = (
        np.append(counts[~rare], counts[rare].sum()),
        np.append(expected[~rare], expected[rare].sum()),
    )
    counts, expected = (x[cells[1] > 0] for x in cells)
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    assert freedom > 3 and statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)


def assert_recorded(completion, outcomes):
    """The recorded log-probabilities and entropies are those of the outcome's tokens."""
    expected = [outcomes[outcome] for outcome in outcomes_of(completion)]
    log_prob = np.asarray(completion.extras['log_prob']).sum(-1)
    assert_allclose(log_prob, np.log([each[1] for each in expected]), rtol=1e-4, atol=1e-5)
    entropy = np.asarray(completion.extras['entropy']).sum(-1)
    assert_allclose(entropy, [each[2] for each in expected], rtol=1e-4, atol=1e-5)


def decoding(commit='low_confidence', steps=2, **options):
    options = {'length': 3, 'block_length': 3, 'temperature': 1.0} | options
    return SamplingConfig(
        steps=steps, commit=commit, stop_early=False, records=('log_prob', 'entropy'), **options
    )


DECODINGS = [
    *(decoding(commit) for commit in ('low_confidence', 'random', 'left_to_right')),
    decoding('left_to_right', steps=3, temperature=2.0, top_k=2, top_p=0.75),
    decoding(sampler='threshold', steps=3, threshold=0.6),
    decoding(sampler='factor', steps=3),
    decoding(sampler='entropy_bounded', steps=3, entropy_bound=0.7, temperature=2.0, top_k=2),
    decoding(sampler='remask', steps=3, threshold=0.7, remasks=1),
]
# `test_sampling` has the same rows as a plain loop where one of these rules decides.
OTHERS = [decoding(commit) for commit in ('entropy', 'margin')]


def name_of(config):
    return f'{config.rule_name}-{config.steps}-{config.temperature}'


@pytest.mark.parametrize('config', DECODINGS, ids=name_of)
def test_the_sampler_draws_and_records_what_is_enumerated(config):
    table = random_table(config.length)
    outcomes = enumerated(table, config)
    completion = completions(table, config)
    assert_frequencies(completion, outcomes)
    if config.sampler and config.steps == 3:  # In some states more is sure than the schedule says.
        assert len({steps for _, steps in outcomes}) > 1
    if config.rule.takes_back:  # What a token was drawn from may have been taken back since.
        assert not config.exact_law
        return
    assert_recorded(completion, outcomes)


@pytest.mark.parametrize('config', DECODINGS[:-1] + OTHERS, ids=name_of)
def test_the_recorded_probabilities_are_the_law_where_the_sampler_says_so(config):
    outcomes = enumerated(random_table(config.length), config)
    # Two random positions of three come first in one of three ways, the last without a choice.
    orders = 3 if config.rule_name == 'random' else 1
    law, recorded = np.array([each[:2] for each in outcomes.values()]).T
    assert config.exact_law == (config.rule_name != 'low_confidence')
    if config.exact_law:
        assert_allclose(law, recorded / orders, rtol=1e-9)
    else:
        assert (recorded >= law - 1e-9).all() and recorded.sum() > 1.5  # and the law sums to 1


def test_low_confidence_is_not_the_law_in_the_example_of_two_positions():
    """Probabilities (.7, .3) and (.6, .4), whatever is known, and one commit."""
    table = np.full((VOCABULARY**2, 2, VOCABULARY), -30.0, np.float32)
    table[:, 0, :2], table[:, 1, :2] = np.log([0.7, 0.3]), np.log([0.6, 0.4])
    config = decoding('low_confidence', length=2, block_length=2)
    completion = completions(table, config)
    steps, tokens = np.asarray(completion.commit_step), np.asarray(completion.tokens)
    log_prob = np.asarray(completion.extras['log_prob'])
    first, second = steps[:, 0] == 0, (steps[:, 1] == 0) & (tokens[:, 1] == 0)
    assert (tokens[first, 0] == 0).all()  # though .7 is recorded
    assert_allclose(np.exp(log_prob[first, 0]), 0.7, rtol=1e-5)
    assert_allclose(np.exp(log_prob[second, 1]), 0.6, rtol=1e-5)
    for hits, probability in ((first, 0.7), (second, 0.18)):
        assert abs(hits.mean() - probability) < 5 * np.sqrt(probability * (1 - probability) / ROWS)


@pytest.mark.parametrize(
    ('options', 'exact'),
    [
        ({'temperature': 0.0}, True),
        ({'steps': 1}, True),  # A step commits all that is left, and chooses nothing.
        ({'steps': 3, 'block_length': 1}, True),
        ({}, False),
    ],
)
def test_low_confidence_is_exact_where_it_chooses_nothing(options, exact):
    assert decoding('low_confidence', **options).exact_law is exact


def test_truncation_keeps_the_likeliest_ids_and_ties():
    prob = np.array([0.4, 0.1, 0.25, 0.25, 0.0])
    logits = jnp.log(jnp.asarray(prob, jnp.float32))  # the last is -inf: never chosen

    kept_ids = jax.jit(token_law.kept_ids, static_argnums=(1, 2, 3))

    def kept(top_k=0, top_p=1.0, temperature=1.0, logits=logits):
        ids = kept_ids(logits, temperature, top_k, top_p)
        return np.flatnonzero(np.asarray(ids)).tolist()

    assert kept() == kept(top_k=9) == [0, 1, 2, 3] and kept(top_k=2) == [0, 2, 3]
    assert kept(top_p=0.39) == [0] and kept(top_p=0.44) == [0, 2, 3]
    assert kept(top_p=0.91) == [0, 1, 2, 3]
    # Top-p counts shares of what top-k left: .4 / .9 of three ids reach .44 already.
    assert kept(top_k=3, top_p=0.44) == [0]
    # At half the temperature shares are those of squares: .16 / .295 is more than half.
    assert kept(top_p=0.53, temperature=0.5) == [0]
    # Where logits are NaN nothing is left out, so that an id that may be chosen is drawn.
    assert kept(top_k=2, top_p=0.5, logits=jnp.full(5, jnp.nan)) == [0, 1, 2, 3, 4]


def test_temperature_zero_records_certainty():
    config = decoding('low_confidence', temperature=0.0, top_k=1, top_p=0.5)
    completion = completions(random_table(3), config)
    assert len(np.unique(np.asarray(completion.tokens), axis=0)) == 1
    assert not any(np.asarray(x).any() for x in completion.extras.values())


def test_kept_ids_come_back_from_their_bits_as_the_same_law():
    """V = 11 is no multiple of 8, and one position keeps nothing, as after an early stop."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(4, 11)), jnp.float32)

    @jax.jit
    def drawn(logits):
        drawable = jnp.where(token_law.kept_ids(logits, 0.6, 5, 0.9), logits, -jnp.inf)
        token = jnp.argmax(drawable, axis=-1).astype(jnp.int32)
        return drawable, token, token_law.record(('kept', 'log_prob'), drawable, token, 0.6)

    drawable, token, records = drawn(logits)
    assert records['kept'].shape == (4, 2) and records['kept'].dtype == jnp.uint8
    kept = records['kept'].at[3].set(0)

    @jax.jit
    @jax.value_and_grad
    def total(logits):
        return token_law.kept_log_probs(logits, kept, token, 0.6)[:3].sum()

    value, gradient = total(logits)
    assert_allclose(value, records['log_prob'][:3].sum(), rtol=1e-5)
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all() and not gradient[3].any()
    assert not gradient[:3][np.isneginf(np.asarray(drawable))[:3]].any() and gradient[:3].any()
