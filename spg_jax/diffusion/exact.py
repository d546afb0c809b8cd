"""Exact laws and likelihoods of toys, by enumeration of all that decoding and masking may do.

A toy has C <= 5 positions and few symbols, which are the ids 0 to S - 1. A partial completion is
then one of N = (S + 1)**C states, and the toy is known completely by its logits in every state.
Everything here but the enumerations of states can be differentiated with respect to those logits.

Letters of axes: `C` positions, `S` symbols, `N` states, `X` = S**C completions, `V` vocabulary, `K`
masks. Sets of positions are bit sets, in which bit i stands for position i.
"""

from collections.abc import Callable, Sequence
from itertools import combinations, permutations, product
from math import comb, factorial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spg_jax.diffusion import informed, token_law
from spg_jax.diffusion.sampling import SamplingConfig

# Rules of commitment whose laws are enumerated.
ENUMERATED = ('low_confidence', 'entropy', 'margin', 'random', 'left_to_right')
MOST_STATES = 4096  # A transition has the square of this number of entries.


class Masks(NamedTuple):
    """The masks that a corruption may draw, and their law."""

    masked: np.ndarray  # [K, C] bool
    block: np.ndarray  # [K] int32, the block that was chosen
    probability: Array  # [K], with sum 1


# --- states ---------------------------------------------------------------------------------------


def every_state(length: int, symbols: int, mask_id: int) -> np.ndarray:
    """All partial completions, [N, C] int32.

    The row of a state is the number in base S + 1 whose digit i is its token at position i, MASK
    being the digit S.

    Raises:
      ValueError: if there are too many to enumerate.
    """
    count = (symbols + 1) ** length
    if count > MOST_STATES:
        raise ValueError(
            f'{length} positions over {symbols} symbols have {count} states; use a toy with at '
            f'most {MOST_STATES}'
        )
    digits = np.array(list(product(range(symbols + 1), repeat=length)), np.int32)[:, ::-1]
    return np.where(digits == symbols, mask_id, digits).astype(np.int32)


def every_completion(length: int, symbols: int) -> np.ndarray:
    """All completions, [X, C] int32; the row is the number in base S of the tokens."""
    return np.array(list(product(range(symbols), repeat=length)), np.int32)[:, ::-1]


def masked_states(length: int, symbols: int) -> np.ndarray:
    """The state of each completion under each mask, [X, 2**C] rows of `every_state`.

    The second axis counts bit sets of masked positions.
    """
    completions = every_completion(length, symbols)  # [X, C]
    digits = np.where(every_mask(length)[None], symbols, completions[:, None])  # [X, 2**C, C]
    return (digits * (symbols + 1) ** np.arange(length)).sum(-1)


def every_mask(length: int) -> np.ndarray:
    """All sets of positions, [2**C, C] bool; the row is the bit set."""
    return (np.arange(2**length)[:, None] >> np.arange(length)) % 2 == 1


def bit_set(positions: Sequence[int]) -> int:
    """The bit set of distinct positions."""
    return sum(1 << i for i in positions)


def token_table(log_prob: Array, length: int, symbols: int) -> Array:
    """log pi(x_i | x under a mask), in nats, [X, 2**C, C].

    Args:
      log_prob: [N, C, V] log-probabilities of all ids in every state.
      length: C.
      symbols: S.
    """
    states = masked_states(length, symbols)  # [X, 2**C]
    tokens = every_completion(length, symbols)  # [X, C]
    return log_prob[states[:, :, None], np.arange(length)[None, None], tokens[:, None]]


# --- likelihoods of ONE completion ----------------------------------------------------------------


def any_order(logp: Array, positions: Sequence[int], masked: int = 0) -> Array:
    """log E_order prod_k pi(x_{order k} | tokens revealed before), over all orders, in nats, [].

    This is the log-likelihood of tokens that are revealed one at a time in a uniformly random
    order, and the limit of masked diffusion in continuous time.

    Args:
      logp: [2**C, C] of one completion, from `token_table`.
      positions: those that are revealed.
      masked: the bit set of positions that stay masked; all others are known from the start.
    """
    total = {0: jnp.zeros(())}  # log of the sum over orders, by the set of positions revealed
    everything = bit_set(positions)
    for size in range(1, len(positions) + 1):
        for revealed in combinations(positions, size):
            seen = bit_set(revealed)
            terms = [
                total[seen ^ (1 << i)] + logp[masked | (everything ^ seen) | (1 << i), i]
                for i in revealed
            ]
            total[seen] = jax.nn.logsumexp(jnp.stack(terms))
    return total[everything] - np.log(factorial(len(positions)))


def block_wise(logp: Array, block_length: int) -> Array:
    """The log-likelihood of blocks in order, each in uniformly random order inside, in nats, [].

    Args:
      logp: [2**C, C] of one completion, from `token_table`.
      block_length: b; the last block may be shorter.
    """
    length = logp.shape[1]
    value = jnp.zeros(())
    for start in range(0, length, block_length):
        stop = min(start + block_length, length)
        value += any_order(logp, range(start, stop), bit_set(range(stop, length)))
    return value


# --- laws of masks, and what bounds are on average ------------------------------------------------


def uniform_masks(length: int, block_length: int) -> Masks:
    """The masks of the corruptions 'uniform' and 'block', with clean earlier blocks.

    A block is drawn uniformly, then a uniform number, at least one, of its positions, then which
    they are; later blocks are masked. With blocks of the whole length this is 'uniform'.

    Args:
      length: C.
      block_length: b, which divides C.
    """
    masked, block = _every_choice(length, block_length)
    size = (masked & _in_block(length, block_length, block)).sum(-1)  # [K]
    # The block has the chance b/C, its number of masked positions 1/b.
    chance = [1 / length / comb(block_length, k) for k in size]
    return Masks(masked, block, jnp.asarray(chance, jnp.float32))


def informed_masks(influence: Array, block_length: int, strength: float) -> Masks:
    """As `uniform_masks`, but the positions of a block are drawn by their influence (`informed`).

    They are drawn one after the other, without replacement, each with the probability
    softmax(preference) over those that are left. This is what the Gumbel top-k trick draws.

    Args:
      influence: [C] of each token.
      block_length: b, which divides C.
      strength: d; with 0 the law is that of `uniform_masks`.
    """
    length = len(influence)
    masked, block = _every_choice(length, block_length)
    inside = _in_block(length, block_length, block)  # [K, C]
    chances = []
    for chosen, region in zip(masked & inside, inside, strict=True):
        preference = informed.masking_preference(influence, jnp.asarray(region), strength)
        weight = jax.nn.softmax(jnp.where(region, preference, -jnp.inf))  # [C]
        orders = np.array(list(permutations(np.flatnonzero(chosen))))  # [orders, size]
        drawn = weight[orders]
        left = 1.0 - jnp.cumsum(drawn, axis=1) + drawn
        chances.append((drawn / left).prod(-1).sum() / length)
    return Masks(masked, block, jnp.stack(chances))


def expected_elbo(
    logp: Array, masks: Masks, elbo: Callable[[Array, Array, Array, Array], Array]
) -> Array:
    """The expectation of an ELBO of one draw, and so of any number of independent draws, [].

    Args:
      logp: [2**C, C] of one completion, from `token_table`.
      masks: the law of a draw.
      elbo: of `bounds.estimator`.
    """
    scored = jnp.ones(logp.shape[1], bool)

    def of_one_draw(row: Array, masked: Array, block: Array) -> Array:
        return elbo(row[None], masked[None], scored, block[None])

    values = jax.vmap(of_one_draw)(logp[_bits(masks)], jnp.asarray(masks.masked), masks.block)
    return (masks.probability * values).sum()


def eubo_of_all_draws(logp: Array, masks: Masks, beta: float, block_length: int = 0) -> Array:
    """The EUBO that an estimate tends to as the number of draws grows, in nats, [].

    (1/beta) sum_i log E[ 1(i in S) exp(beta logp_i) n/|S| ], or the sum over blocks of the same
    within each block, from the draws that chose it.

    Args:
      logp: [2**C, C] of one completion, from `token_table`.
      masks: the law of a draw.
      beta: the Renyi order.
      block_length: of the estimator 'block'; 0 stands for those that score all masked positions.
    """
    length = logp.shape[1]
    scored = masks.masked
    if block_length:
        scored = scored & _in_block(length, block_length, masks.block)
    weight = length * masks.probability / scored.sum(-1)  # [K]; E over blocks times their number
    terms = beta * logp[_bits(masks)] + jnp.log(weight)[:, None]  # [K, C]
    return jax.nn.logsumexp(jnp.where(scored, terms, -jnp.inf), axis=0).sum() / beta


def _every_choice(length: int, block_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Every block with every non-empty part of it masked, and all later blocks: [K, C], [K]."""
    masked, blocks = [], []
    for start in range(0, length, block_length):
        for part in every_mask(block_length)[1:]:
            row = np.arange(length) >= start + block_length
            row[start : start + block_length] = part
            masked.append(row)
            blocks.append(start // block_length)
    return np.array(masked), np.array(blocks, np.int32)


def _in_block(length: int, block_length: int, block: np.ndarray) -> np.ndarray:
    """Whether each position lies in the block, [K, C] bool."""
    return np.arange(length)[None] // block_length == block[:, None]


def _bits(masks: Masks) -> np.ndarray:
    """The bit set of each mask, [K]."""
    return (masks.masked * 2 ** np.arange(masks.masked.shape[1])).sum(-1)


# --- the law of a decoder -------------------------------------------------------------------------


def transition(
    logits: Array, decoding: SamplingConfig, step: int, symbols: int, mask_id: int
) -> Array:
    """The probabilities [N, N] with which a step of the sampler takes each state to each other.

    All tokens that the step may draw at the masked positions of its block are enumerated, and with
    them the positions that it then commits. Which positions these are changes in jumps as the
    policy changes, so that the derivative is that of the probabilities of the tokens drawn, with
    the order of confidences held fixed. Almost everywhere it is the derivative of the law.

    Args:
      logits: [N, C, V] in every state.
      decoding: how completions are decoded; without guidance.
      step: the denoising step, counted over the whole completion.
      symbols: S.
      mask_id: the MASK token.

    Raises:
      ValueError: for a decoder that is not enumerated here.
    """
    check_decoding(decoding)
    length, size = decoding.length, decoding.block_length
    start = step // decoding.steps_per_block * size
    block = np.arange(start, start + size)
    share, remainder = divmod(size, decoding.steps_per_block)
    count = share + (step % decoding.steps_per_block < remainder)
    states = every_state(length, symbols, mask_id)
    masked = states[:, block] == mask_id  # [N, b]
    logits = logits[:, block]  # [N, b, V]
    draws = every_completion(size, symbols)  # [K, b], what the positions of the block may draw
    # Where nothing is drawn, because the token is there already, one draw stands for all.
    is_first = (draws[None] == 0) | masked[:, None, :]  # [N, K, b]
    law = jnp.where(masked[:, None, :], _picked(_token_law(logits, decoding, symbols), draws), 0.0)
    chance = jnp.exp(law.sum(-1)) * is_first.all(-1)  # [N, K]
    scores = jax.lax.stop_gradient(_scores(logits, draws, decoding, symbols))  # [R, N, K, b]
    committed = _highest(jnp.where(masked[None, :, None, :], scores, -jnp.inf), count)
    committed &= masked[None, :, None, :]  # [R, N, K, b]
    # A commit changes the digit of a position from S, which stands for MASK, to the token drawn.
    change = (draws - symbols) * (symbols + 1) ** block  # [K, b]
    after = np.arange(len(states))[None, :, None] + jnp.where(committed, change[None, None], 0).sum(
        -1
    )  # [R, N, K]
    rankings = len(scores)
    before = np.broadcast_to(np.arange(len(states))[None, :, None], after.shape)
    weight = jnp.broadcast_to(chance[None] / rankings, after.shape)
    return jnp.zeros((len(states), len(states))).at[before, after].add(weight)


def check_decoding(decoding: SamplingConfig) -> None:
    """Raises ValueError for a decoder whose law is not enumerated here."""
    if decoding.guidance or decoding.temperature == 0.0:
        raise ValueError(
            f'sampling.guidance is {decoding.guidance} and sampling.temperature '
            f'{decoding.temperature}; the law of completions is enumerated without guidance, at '
            'temperatures above 0'
        )
    if decoding.rule_name not in ENUMERATED or decoding.schedule != 'even':
        raise ValueError(
            f'sampling.{decoding.rule_setting} is {decoding.rule_name!r} and sampling.schedule '
            f'{decoding.schedule!r}; the law of completions is enumerated for '
            f"{', '.join(ENUMERATED)}, with schedule 'even'"
        )


def completion_law(logits: Array, decoding: SamplingConfig, symbols: int, mask_id: int) -> Array:
    """The probability of each completion under a decoder, [X], in the order of `every_completion`.

    The arguments are those of `transition`. An early stop is not simulated, since a toy has no EOS.
    Tokens in random order, one a step, have the likelihood of `block_wise`, which costs far less.
    """
    check_decoding(decoding)
    if decoding.rule_name == 'random' and decoding.steps == decoding.length:
        log_prob = _token_law(logits, decoding, symbols)  # [N, C, S]
        table = token_table(log_prob, decoding.length, symbols)  # [X, 2**C, C]
        return jnp.exp(jax.vmap(lambda logp: block_wise(logp, decoding.block_length))(table))
    states = every_state(decoding.length, symbols, mask_id)
    law = jnp.zeros(len(states)).at[-1].set(1.0)  # Everything is masked in the last state.
    for step in range(decoding.steps):
        law = law @ transition(logits, decoding, step, symbols, mask_id)
    return law[masked_states(decoding.length, symbols)[:, 0]]


def path_law(
    logits: Array, decoding: SamplingConfig, symbols: int, mask_id: int
) -> tuple[np.ndarray, Array]:
    """The order in which a decoder commits the tokens of each completion, one token a step.

    The arguments are those of `transition`.

    Returns:
      orders [O, C] of positions, and the joint probability [X, O] of completion and order.

    Raises:
      ValueError: if a step commits several tokens, or the decoder is not enumerated here.
    """
    if decoding.steps != decoding.length:
        raise ValueError(
            f'sampling.steps is {decoding.steps} for {decoding.length} tokens; orders are '
            'enumerated for one token a step'
        )
    states = masked_states(decoding.length, symbols)  # [X, 2**C]
    orders = np.array(list(permutations(range(decoding.length))))  # [O, C]
    left = _masks_along(orders)  # [O, C + 1]
    law = jnp.ones((len(states), len(orders)))
    for step in range(decoding.steps):
        matrix = transition(logits, decoding, step, symbols, mask_id)
        law *= matrix[states[:, left[:, step]], states[:, left[:, step + 1]]]
    return orders, law


def influence_along(confidence: Array, orders: np.ndarray, window: int) -> Array:
    """The influence of each token when it was committed (`informed`), [X, O, C].

    Args:
      confidence: [N', C] top-1 probabilities, N' = X x 2**C: of each completion under each mask,
        as [X, 2**C, C].
      orders: [O, C], of `path_law`.
      window: w, how far from a token changes count.
    """
    length = orders.shape[1]
    left = _masks_along(orders)  # [O, C + 1]
    near = np.abs(np.arange(length)[:, None] - np.arange(length)) <= window  # [C, C]
    influence = jnp.zeros((len(confidence), len(orders), length))
    for step in range(length - 1):  # After the last step there is no further pass.
        before, after = confidence[:, left[:, step]], confidence[:, left[:, step + 1]]
        place = orders[:, step]  # [O]
        counts = every_mask(length)[left[:, step + 1]] & near[place]  # [O, C]
        change = jnp.where(counts[None], jnp.abs(after - before), 0.0).sum(-1)  # [X, O]
        influence = influence.at[:, np.arange(len(orders)), place].set(change)
    return influence


def _masks_along(orders: np.ndarray) -> np.ndarray:
    """The bit sets of masked positions before each step and after the last, [O, C + 1]."""
    committed = np.cumsum(1 << orders, axis=1)
    return 2 ** orders.shape[1] - 1 - np.pad(committed, ((0, 0), (1, 0)))


def _token_law(logits: Array, decoding: SamplingConfig, symbols: int) -> Array:
    """The law that tokens are drawn from, [N, b, S] log-probabilities of the symbols."""
    drawable = logits[..., :symbols]
    if decoding.top_k or decoding.top_p < 1.0:
        kept = token_law.kept_ids(drawable, decoding.temperature, decoding.top_k, decoding.top_p)
        drawable = jnp.where(kept, drawable, -jnp.inf)
    return jax.nn.log_softmax(drawable / decoding.temperature, axis=-1)


def _picked(values: Array, draws: np.ndarray) -> Array:
    """values [N, b, S] of the symbols drawn, draws [K, b] -> [N, K, b]."""
    return values[:, np.arange(draws.shape[1])[None], draws]


def _scores(logits: Array, draws: np.ndarray, decoding: SamplingConfig, symbols: int) -> Array:
    """What positions are ranked by, highest first, [R, N, K, b]; the R rankings are equally likely.

    Only random positions have several rankings.
    """
    shape = (len(logits), *draws.shape)  # [N, K, b]
    log_prob = jax.nn.log_softmax(logits, axis=-1)  # [N, b, V]
    prob = jnp.exp(log_prob)
    size = draws.shape[1]
    match decoding.rule_name:
        case 'random':
            rankings = jnp.asarray(list(permutations(range(size))), jnp.float32)  # [R, b]
            return jnp.broadcast_to(rankings[:, None, None], (len(rankings), *shape))
        case 'left_to_right':
            score = -jnp.arange(size, dtype=jnp.float32)[None, None]
        case 'entropy':
            score = (prob * log_prob).sum(-1)[:, None]
        case 'margin':
            best = jax.lax.top_k(prob[..., :symbols], 2)[0]  # [N, b, 2]
            score = (best[..., 0] - best[..., 1])[:, None]
        case _:  # low_confidence
            score = _picked(log_prob, draws)
    return jnp.broadcast_to(score, shape)[None]


def _highest(score: Array, count: int) -> Array:
    """The `count` highest along the last axis, bool; of equal ones the earlier.

    Comparing all pairs of a few positions takes less time than many sorts of them.
    """
    mine, other = score[..., :, None], score[..., None, :]
    is_earlier = np.tri(score.shape[-1], k=-1, dtype=bool)
    is_before = jnp.where(is_earlier, other >= mine, other > mine)
    return is_before.sum(-1) < count
