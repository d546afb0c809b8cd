"""The sampler against published completions and against a plain loop in numpy, row by row."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from spg_jax.diffusion.sampling import SamplingConfig, begin, decoder_of, finish, generate
from spg_jax.models.transformer import Transformer
from spg_jax.models.weights import load_checkpoint

pytestmark = pytest.mark.numerical

REFERENCE = Path(__file__).parents[1] / 'reference'
PUBLISHED = {  # case -> (guidance, padding that is put before its prompts)
    'steps32_len32_block32': (0.0, 0),
    'steps16_len32_block8': (0.0, 0),
    'steps32_len32_block8': (0.0, 0),
    'steps12_len32_block8': (0.0, 6),
    'steps8_len32_block16': (0.0, 0),
    'steps16_len32_block8_cfg1.5': (1.5, 6),
}


@pytest.fixture(scope='module')
def tiny_llada():
    config, ids, params = load_checkpoint(REFERENCE / 'tiny_llada')
    model = Transformer(config)

    def hidden(tokens, valid, window):
        return model.apply({'params': params}, tokens, valid, None, window, method='hidden')

    def unembed(states):
        return model.apply({'params': params}, states, method='unembed')

    return hidden, unembed, ids


@pytest.mark.compiled_as_users_do
@pytest.mark.parametrize('case', PUBLISHED)
def test_completions_are_the_published_ones_with_and_without_padding(tiny_llada, case):
    hidden, unembed, ids = tiny_llada
    guidance, padding = PUBLISHED[case]
    with np.load(REFERENCE / 'generate.npz') as file:
        assert set(file.files) == {'prompt', *PUBLISHED}
        prompt, expected = file['prompt'], file[case]
    steps, length, block = map(int, re.findall(r'\d+', case)[:3])
    config = SamplingConfig(length, steps, block, 0.0, guidance=guidance)
    if padding:
        # The padding holds a token that must not be read.
        prompt = np.concatenate([np.full((len(prompt), padding), 77, np.int32), prompt], axis=1)
    completion = jax.jit(
        lambda tokens, mask, keys: generate(
            hidden, unembed, tokens, mask, keys, config, ids.mask, ids.eos, jnp.ones(256, bool)
        )
    )(
        prompt,
        np.broadcast_to(np.arange(prompt.shape[1]) >= padding, prompt.shape),
        jax.random.split(jax.random.key(0), len(prompt)),
    )
    assert_array_equal(completion.tokens, expected)


# ---- A toy model: its states mix all tokens by their distance, so that every token matters and
# ---- padding on the left shifts nothing. It is small enough for a float64 copy in numpy.

VOCABULARY, WIDTH = 19, 12
EOS, MASK, FORBIDDEN = 1, 18, (0, 14)
ALLOWED = ~np.isin(np.arange(VOCABULARY), FORBIDDEN)  # the sampler itself has to exclude MASK
_rng = np.random.default_rng(7)
EMBEDDING = _rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
UNEMBEDDING = _rng.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)


class Toy:
    """logits = 2 tanh(mix) U + bias; the biases make EOS, MASK and forbidden ids more likely.

    Toys of one class share their programs, because the biases are arguments.
    """

    def __init__(self, eos_bias=-20.0, hidden_bias=1.5):
        self.bias = np.zeros(VOCABULARY, np.float32)
        self.bias[EOS] = eos_bias
        self.bias[[MASK, *FORBIDDEN]] = hidden_bias

    def hidden(self, tokens, valid, xp=jnp):
        length = tokens.shape[1]
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        mixing = np.cos(0.7 * distance) * 0.9 ** np.abs(distance)
        embedded = xp.asarray(EMBEDDING)[tokens] * valid[:, :, None]
        return xp.tanh(xp.einsum('lm,bmd->bld', xp.asarray(mixing), embedded))

    def unembed(self, states, xp=jnp):
        return 2.0 * states @ xp.asarray(UNEMBEDDING) + xp.asarray(self.bias)[None, None, :]

    def in_window(self, tokens, valid, window):
        return window.cut(self.hidden(tokens, valid))

    def generate(self, prompt, prompt_mask, keys, config, compact=False):
        return completed(type(self), self.bias, prompt, prompt_mask, keys, config, compact)


@partial(jax.jit, static_argnums=(0, 5, 6))
def completed(kind, bias, prompt, prompt_mask, keys, config, compact):
    toy = kind()
    toy.bias = bias
    model, ids = (toy.in_window, toy.unembed), (MASK, EOS, ALLOWED)
    if not compact:
        return generate(*model, prompt, prompt_mask, keys, config, *ids)
    decoder = decoder_of(*model, prompt_mask, keys, config, *ids, compact=True)
    carry = begin(prompt, prompt_mask, keys, config, MASK, VOCABULARY)
    return finish(decoder, jax.lax.while_loop(decoder.unfinished, decoder.advance, carry))


CALLS = []


class Counting(Toy):
    """A toy that writes the rows of each of its forward passes into CALLS."""

    def hidden(self, tokens, valid, xp=jnp):
        if xp is jnp:
            jax.debug.callback(partial(CALLS.append, len(tokens)))
        return super().hidden(tokens, valid, xp)


def passes_of(toy, config, compact=False):
    """The completions of the prompts, and the rows of each forward pass of a `Counting` toy."""
    tokens, mask = prompts()
    jax.effects_barrier()  # for the passes of earlier programs
    CALLS.clear()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    completion = toy.generate(tokens, mask, keys, config, compact)
    jax.effects_barrier()
    return completion, list(CALLS)


def plain_loop(toy, prompt, key, config):
    """Tokens and commit steps of one row without padding, by plain lists in float64."""
    sequence = [*prompt, *[MASK] * config.length]
    first = len(prompt)
    commit_step = [-1] * config.length
    blocks = config.length // config.block_length
    steps = config.steps // blocks
    for step in range(config.steps):
        block, within = divmod(step, steps)
        block_start = first + block * config.block_length
        positions = range(block_start, block_start + config.block_length)
        if config.stop_early and within == 0 and EOS in sequence[first:block_start]:
            for i in range(block_start, len(sequence)):
                sequence[i] = EOS
            break
        logits = logits_in_numpy(toy, sequence)
        if config.guidance:
            blind = logits_in_numpy(toy, [MASK] * first + sequence[first:])
            logits = blind + (1 + config.guidance) * (logits - blind)
        noise_key, commit_key = (jax.random.fold_in(key, 2 * step + k) for k in range(2))
        gumbel = np.asarray(jax.random.gumbel(noise_key, (config.block_length, VOCABULARY)))
        at_random = np.asarray(jax.random.uniform(commit_key, (config.block_length,)))
        token, score = {}, {}
        for i in positions:
            if sequence[i] != MASK:
                continue
            probability = np.exp(logits[i] - logits[i].max())
            probability /= probability.sum()
            choices = [v for v in range(VOCABULARY) if ALLOWED[v] and v != MASK]
            noisy = logits[i] + config.temperature * gumbel[i - block_start]
            token[i] = max(choices, key=noisy.__getitem__)
            best = sorted((probability[v] for v in choices), reverse=True)
            score[i] = {
                'low_confidence': probability[token[i]],
                'random': at_random[i - block_start],
                'entropy': (probability * np.log(probability)).sum(),
                'margin': best[0] - best[1],
                'left_to_right': -i,
            }[config.commit]
        count = config.block_length // steps + (within < config.block_length % steps)
        for i in sorted(score, key=score.__getitem__, reverse=True)[:count]:
            sequence[i] = token[i]
            commit_step[i - first] = step
    return sequence[first:], commit_step


def logits_in_numpy(toy, sequence):
    tokens = np.array([sequence])
    states = toy.hidden(tokens, np.ones(tokens.shape, bool), xp=np)
    return toy.unembed(states, xp=np)[0].astype(np.float64)


def prompts(rows=5, length=6):
    """Left-padded prompts of different lengths, as tokens and their mask."""
    rng = np.random.default_rng(2)
    mask = np.arange(length)[None, :] >= np.arange(rows)[:, None] % 4
    return rng.integers(2, 13, (rows, length)).astype(np.int32), mask


def check(toy, config, seed=0):
    """The completion by the sampler, after comparing it with `plain_loop` row by row."""
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(seed), len(tokens))
    completion = toy.generate(tokens, mask, keys, config)
    for row in range(len(tokens)):
        expected, steps = plain_loop(toy, tokens[row][mask[row]].tolist(), keys[row], config)
        assert_array_equal(completion.tokens[row], expected)
        assert_array_equal(completion.commit_step[row], steps)
    return completion


@pytest.mark.parametrize(
    ('commit', 'temperature', 'steps', 'block'),
    [
        ('random', 1.0, 5, 12),
        ('entropy', 1.0, 9, 4),
        ('margin', 0.0, 9, 4),
        ('left_to_right', 1.0, 12, 4),
        ('low_confidence', 0.0, 5, 12),
    ],
)
def test_sampler_is_the_plain_loop(commit, temperature, steps, block):
    """By confidence and with noise it is the plain loop where rows end early, further below."""
    completion = check(Toy(), SamplingConfig(12, steps, block, temperature, commit))
    tokens = np.asarray(completion.tokens)
    assert ALLOWED[tokens].all() and (tokens != MASK).all()
    counts = np.bincount(np.asarray(completion.commit_step).ravel()) / len(tokens)
    # The remainder goes to the first steps: 4 in 3 steps is 2, 1, 1 and 12 in 5 is 3, 3, 2, 2, 2.
    assert counts.tolist() == {12: [1] * 12, 9: [2, 1, 1] * 3, 5: [3, 3, 2, 2, 2]}[steps]


@pytest.mark.fast
def test_guidance_is_the_plain_loop():
    """A published completion is guided without noise."""
    check(Toy(), SamplingConfig(8, 4, 4, 1.0, guidance=1.5))


@pytest.mark.fast
def test_forbidden_ids_keep_their_share_of_the_confidence():
    """Were MASK and forbidden ids cut from the softmax, other tokens would be committed first."""
    tokens, mask = prompts()
    config = SamplingConfig(12, 5, 12, 0.0)
    completion = check(Toy(), config)
    without_share = Toy(hidden_bias=-600.0)
    steps = [
        plain_loop(without_share, row[here].tolist(), jax.random.key(0), config)[1]
        for row, here in zip(tokens, mask, strict=True)
    ]
    assert (np.array(steps) != completion.commit_step).any()


# Tests of what ends early share two programs.
STOPPING = SamplingConfig(16, 8, 4, 1.0)
WHOLE = SamplingConfig(16, 8, 4, 1.0, stop_early=False)


@pytest.mark.fast
def test_early_stop_is_the_plain_loop_and_changes_nothing_through_the_first_eos():
    toy = Counting(eos_bias=3.0)
    stopped, whole = check(toy, STOPPING), check(toy, WHOLE)
    tokens = np.asarray(whole.tokens)
    first = np.where((tokens == EOS).any(-1), (tokens == EOS).argmax(-1), 15)
    assert len({*(first // 4)}) > 1  # rows end in different blocks
    through = np.arange(16) <= first[:, None]
    assert_array_equal(np.asarray(stopped.tokens)[through], tokens[through])
    ended = np.arange(16) // 4 > first[:, None] // 4
    assert ended.any() and (np.asarray(stopped.tokens)[ended] == EOS).all()
    assert_array_equal(np.asarray(stopped.commit_step) == -1, ended)
    assert (np.asarray(whole.commit_step) >= 0).all()


@pytest.mark.parametrize(
    ('eos_bias', 'config', 'passes'), [(60.0, STOPPING, 2), (60.0, WHOLE, 8), (-60.0, STOPPING, 8)]
)
def test_program_runs_the_model_only_until_every_row_has_ended(eos_bias, config, passes):
    assert len(passes_of(Counting(eos_bias), config)[1]) == passes


def test_only_the_current_block_is_unembedded():
    shapes = set()

    class Watching(Toy):
        def unembed(self, states, xp=jnp):
            shapes.add(states.shape)
            return super().unembed(states)

    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    jax.eval_shape(lambda: Watching().generate(tokens, mask, keys, STOPPING))
    assert shapes == {(5, 4, WIDTH)}


def test_a_prompt_alone_or_in_a_batch_padded_or_not_gives_the_same_tokens():
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(5), len(tokens))
    toy, config = Counting(eos_bias=1.0), STOPPING
    batch = toy.generate(tokens, mask, keys, config)
    assert len(np.unique(batch.tokens, axis=0)) == len(tokens)
    row = 3  # of 3 tokens
    prompt = tokens[row : row + 1, mask[row].argmax() :]
    alone = toy.generate(prompt, np.ones_like(prompt, bool), keys[row : row + 1], config)
    assert_array_equal(alone.tokens[0], batch.tokens[row])
    assert_array_equal(alone.commit_step[0], batch.commit_step[row])
    order = np.array([3, 0, 4, 1, 2])
    shuffled = toy.generate(tokens[order], mask[order], keys[order], config)
    assert_array_equal(shuffled.tokens, np.asarray(batch.tokens)[order])


def test_temperature_one_draws_from_the_distribution():
    """Compares frequencies of one token in 2000 rows with the softmax over allowed tokens."""
    rows = 2_000
    prompt = np.broadcast_to(np.array([[4, 7]], np.int32), (rows, 2))
    keys = jax.random.split(jax.random.key(9), rows)
    config = SamplingConfig(1, 1, 1, 1.0)
    completion = Toy().generate(prompt, np.ones_like(prompt, bool), keys, config)
    logits = logits_in_numpy(Toy(), [4, 7, MASK])[2]
    logits[~ALLOWED] = logits[MASK] = -np.inf
    expected = np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount(np.asarray(completion.tokens)[:, 0], minlength=VOCABULARY)
    error = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(counts / rows - expected) <= 5 * error + 1e-3).all()


def test_logits_that_are_not_finite_still_give_allowed_tokens_and_no_mask():
    """tests/diffusion/test_samplers.py has every rule on such logits, one step of each."""
    row = np.arange(5)[:, None, None]

    class Broken(Toy):
        def unembed(self, states, xp=jnp):
            logits = super().unembed(states)
            logits = logits.at[1].set(jnp.nan).at[2, :, 3:].set(-jnp.inf).at[3, :, 5].set(1e4)
            return jnp.where(
                (ALLOWED & (np.arange(VOCABULARY) != MASK))[None, None, :] & (row == 4),
                -jnp.inf,
                logits,
            )

    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), len(tokens))
    config = SamplingConfig(12, 6, 4, 0.5)
    completion = np.asarray(Broken().generate(tokens, mask, keys, config).tokens)
    assert ALLOWED[completion].all() and (completion != MASK).all()


@pytest.mark.fast
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'length': 250, 'block_length': 32},
            'length 250 is not a multiple of sampling.block_length 32; use length 256',
        ),
        ({'steps': 10}, 'steps 10 do not spread evenly over 4 blocks; use steps 12'),
        ({'steps': 64}, 'steps 64 exceeds sampling.length 32.*at most 32'),
        ({'steps': 0}, 'steps is 0; use at least 1'),
        ({'length': 0}, 'length is 0; use at least 1'),
        ({'block_length': 0}, 'block_length is 0; use at least 1'),
        ({'temperature': -0.1}, 'temperature is -0.1; use 0 or more'),
        ({'commit': 'best'}, "commit is 'best'; use one of low_confidence, random"),
        ({'top_k': -1}, 'top_k is -1; use 1 or more, or 0 for all ids'),
        ({'top_p': 0.0}, 'top_p is 0.0; use a share above 0 and at most 1'),
        ({'records': ('law',)}, "a record of the sampler is 'law'; use one of log_prob"),
    ],
)
def test_impossible_configurations_are_refused_with_the_fix(options, message):
    possible = {'length': 32, 'steps': 16, 'block_length': 8, 'temperature': 0.0}
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**{**possible, **options})


@pytest.mark.fast
def test_arguments_that_do_not_agree_are_refused():
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.key(0), 5)
    config = SamplingConfig(4, 2, 2, 0.0)
    toy = Toy()
    with pytest.raises(ValueError, match='do not agree'):
        toy.generate(tokens, mask[:, 1:], keys, config)
    with pytest.raises(ValueError, match='do not agree'):
        toy.generate(tokens, mask, keys[:3], config)
    with pytest.raises(ValueError, match='both 1'):
        generate(toy.in_window, toy.unembed, tokens, mask, keys, config, EOS, EOS, ALLOWED)
