"""The loop of a sampler: a decoder advances a batch by one block, step by step.

All rows of a batch take the same steps within a block. A row whose block is finished waits, so that
it does not matter to a row how many steps its neighbours need. With `compact` it does not take part
in their steps: once few blocks are open, their rows alone go on. Rows may be in different blocks:
then `Carry.block` has one entry a row, and everything that is cut out of a row is cut at its own
place.

A comment such as `# [B, b, V]` after an assignment is the shape of the value: `B` sequences, `L`
tokens of prompt (`P`) and completion (`C`), `b` positions of a block, `V` vocabulary, `D` width;
`R` rounds of editing; `[]` is a scalar.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from spg_jax.diffusion import informed
from spg_jax.diffusion.samplers import rules
from spg_jax.diffusion.samplers.prediction import predict
from spg_jax.diffusion.samplers.settings import SamplingConfig
from spg_jax.models.windows import Window, cut, put

# A batch shrinks to a half, a quarter or an eighth of its rows: each size is a program of its own.
SHARES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True, eq=False)
class CachedModel:
    """The model with a cache of keys and values, for approximate samplers.

    Attributes:
      empty: (B, L) -> a cache, a pytree whose values do not matter.
      take: (cache, index [n] int32) -> the cache of n of the rows.
      read: (tokens [B, w] at the positions from `start`, valid [B, L], cache, start [] or [B],
        window of the w positions) -> (hidden states [B, b, D] of the window, cache), where keys and
        values of the w positions are new and those of all others are the cache's. With w = L
        nothing of the cache is read.
    """

    empty: Callable[[int, int], Any]
    take: Callable[[Any, Array], Any]
    read: Callable[[Array, Array, Any, Array, Window], tuple[Array, Any]]


@struct.dataclass
class Carry:
    """What one block hands to the next."""

    block: Array  # int32, the next block to finish: [] for all rows, or [B]; at the end `blocks`
    tokens: Array  # [B, L] int32, prompt and completion, MASK where not yet committed
    commit_step: Array  # [B, C] int32, the step that committed a token, -1 where none did
    extras: dict[str, Array]  # [B, C, ...], what is recorded of each token
    # [B, C] float32, top-1 probabilities of the step before, where they were read; or None
    confidence: Array | None


@struct.dataclass
class Steps:
    """What one step of a block hands to the next."""

    turn: Array  # [] int32, the step of this block
    carry: Carry
    waits: Array  # [B] bool, rows that had ended before this block
    taken: Array | None  # [B] int32, tokens of this block that were taken back; or None
    post: Array | None  # [B] int32, rounds without MASK that a row may still take; or None
    cache: Any  # keys and values, or None


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """The steps of a block. Its fields do not change between steps."""

    hidden_fn: Callable[[Array, Array, Window], Array]
    unembed_fn: Callable[[Array], Array]
    valid: Array  # [B, L] bool
    keys: Array  # [B]
    config: SamplingConfig
    prompt_length: int
    mask_id: int
    eos_id: int
    allowed: Array  # [V] bool, without MASK
    cached: CachedModel | None = None
    generated: Array | None = None  # [B, C] bool, False on given tokens; None is all
    compact: bool = False  # whether rows whose block is finished leave the batch until it ends

    def ended(self, carry: Carry) -> Array:
        """Whether each row needs no further block, [B] bool; it is asked between blocks."""
        finished = carry.block >= self.config.blocks  # [] or [B]
        if not self.config.stop_early:
            return jnp.broadcast_to(finished, self.keys.shape)
        completion = carry.tokens[:, self.prompt_length :]  # [B, C]
        return finished | is_generated_eos(completion, self.eos_id, self.generated).any(-1)

    def unfinished(self, carry: Carry) -> Array:
        """Whether a block is left and some row has not ended, [] bool."""
        # The first limit is known to the compiler, and `planning.collectives` reads it.
        block_left = (carry.block < self.config.blocks).any()
        return block_left & ~self.ended(carry).all()

    def advance(self, carry: Carry) -> Carry:
        """Finishes the current block of each row: `start`, then `finish`."""
        return self.finish(self.start(carry))

    def start(self, carry: Carry, sharing: int = 1) -> Steps:
        """Begins the current block of each row, and takes its first step where that is special.

        Args:
          carry: of the block before.
          sharing: how many rows, one after another, hold the same tokens, as the rows of a group do
            at the beginning; they share the pass of the first step.
        """
        rule, rows = self.config.rule, len(self.keys)
        steps = Steps(
            turn=jnp.zeros((), jnp.int32),
            carry=carry,
            waits=self.ended(carry),
            taken=jnp.zeros(rows, jnp.int32) if rule.takes_back else None,
            post=jnp.full(rows, self.config.post_steps) if self.config.edits_in_blocks else None,
            cache=self.cached.empty(rows, self.valid.shape[1]) if self.cached else None,
        )
        if sharing > 1:
            return self._once_for_equal_rows(sharing)._denoise(steps, is_first=True)
        if self.cached:  # The first step refreshes; outside of the loop it copies no cache.
            return self._denoise(steps, is_first=True)
        return steps

    def finish(self, steps: Steps) -> Carry:
        """Takes the steps that are left of the current block.

        Where rows are in different blocks, a row that has ended goes to the end.
        """
        may_shrink = self.compact and not self.config.rule.even
        sizes = compacted_sizes(len(self.keys))[:-1] if may_shrink else ()
        carry = self._finish_block(steps, sizes)
        block = carry.block + 1
        if block.ndim:
            block = jnp.where(self.ended(carry.replace(block=block)), self.config.blocks, block)
        return carry.replace(block=block)

    def _once_for_equal_rows(self, count: int) -> 'Decoder':
        """The decoder whose passes read one of `count` equal rows in place of all of them."""
        rows = len(self.keys)

        def one_of_each(x: Any) -> Any:
            return x[::count] if jnp.ndim(x) else x

        def hidden_fn(tokens: Array, valid: Array, window: Window) -> Array:
            window = window._replace(start=one_of_each(window.start))
            hidden = self.hidden_fn(one_of_each(tokens), one_of_each(valid), window)
            return jnp.repeat(hidden, count, axis=0)

        def read(
            tokens: Array, valid: Array, cache: Any, start: Array, window: Window
        ) -> tuple[Array, Any]:
            cache = self.cached.empty(rows // count, valid.shape[1])  # A refresh reads none of it.
            window = window._replace(start=one_of_each(window.start))
            hidden, cache = self.cached.read(
                one_of_each(tokens), one_of_each(valid), cache, one_of_each(start), window
            )
            of_rows = jnp.arange(rows) // count
            return jnp.repeat(hidden, count, axis=0), self.cached.take(cache, of_rows)

        cached = self.cached and dataclasses.replace(self.cached, read=read)
        return dataclasses.replace(self, hidden_fn=hidden_fn, cached=cached)

    def _finish_block(self, steps: Steps, sizes: tuple[int, ...]) -> Carry:
        """Takes steps until the block of every row is finished.

        As soon as no more rows are open than the largest of `sizes`, ascending, these go on alone.
        """
        fewer = sizes[-1] if sizes else 0

        def goes_on(steps: Steps) -> Array:
            step_left = steps.turn < self.config.rounds_per_block
            if self.config.rule.even:  # so that the last step always has something to commit
                return step_left
            return step_left & (self._is_open(steps).sum() > fewer)

        steps = jax.lax.while_loop(goes_on, self._denoise, steps)
        if not fewer:
            return steps.carry
        # Finished rows fill the smaller batch, and change nothing in it.
        index = jnp.argsort(~self._is_open(steps))[:fewer]
        smaller, few = self._take(steps, index)
        carry = smaller._finish_block(few, sizes[:-1])
        return jax.tree.map(
            lambda all_rows, some: all_rows.at[index].set(some) if some.ndim else all_rows,
            steps.carry,
            carry,
        )

    def _is_open(self, steps: Steps) -> Array:
        """Whether a row has something left to do in its block, [B] bool."""
        is_open = (self._block_tokens(steps.carry) == self.mask_id).any(-1)  # [B]
        if steps.post is not None:
            is_open |= steps.post > 0
        return is_open & ~steps.waits

    def _take(self, steps: Steps, index: Array) -> tuple['Decoder', Steps]:
        """The decoder and the steps of n rows, whose places are `index` [n]."""

        def of_rows(x: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[index] if leaf.ndim else leaf, x)

        cache = self.cached.take(steps.cache, index) if self.cached else None
        decoder = dataclasses.replace(
            self,
            valid=self.valid[index],
            keys=self.keys[index],
            generated=of_rows(self.generated),
        )
        return decoder, of_rows(steps.replace(cache=None)).replace(cache=cache)

    def _start(self, carry: Carry) -> Array:
        """The first completion position of the current block, [] or [B]; within the completion."""
        block = carry.block
        if block.ndim:  # The rows that have ended look at the last block and change nothing.
            block = jnp.minimum(block, self.config.blocks - 1)
        return block * self.config.block_length

    def _block_tokens(self, carry: Carry) -> Array:
        """[B, b]."""
        return cut(carry.tokens, self.prompt_length + self._start(carry), self.config.block_length)

    def _denoise(self, steps: Steps, is_first: bool = False) -> Steps:
        """Predicts the masked positions of the current block and commits some of them.

        A rule may also take tokens back, or write others in their place. `is_first` says that it
        is known to be the first step of the block.
        """
        config, carry, rule = self.config, steps.carry, self.config.rule
        start = self._start(carry)  # [] or [B]
        step = carry.block * config.steps_per_block + steps.turn  # [] or [B], over the completion
        tokens = self._block_tokens(carry)  # [B, b]
        is_masked = tokens == self.mask_id
        if carry.block.ndim:
            is_masked &= (carry.block < config.blocks)[:, None]
        carry, logits, cache = self._look(steps, step, start, is_first)  # logits [B, b, V]
        names = config.records
        if rule.takes_back:
            names = tuple({*names, 'confidence'})
        noise_step = step
        if steps.post is not None:  # Rounds that only edit draw tokens as well.
            names = tuple({*names, 'log_prob'})
            noise_step = carry.block * config.rounds_per_block + steps.turn
        prediction, commit, records, view = predict(
            logits,
            is_masked,
            self.keys,
            noise_step,
            steps.turn,
            self.allowed,
            config,
            names,
        )
        commit_step = cut(carry.commit_step, start, config.block_length)  # [B, b]
        taken, post = steps.taken, steps.post
        if taken is not None:
            is_back, taken = self._take_back(steps, carry, commit_step, is_masked, start)
        if post is not None:
            edit, post = self._choose_edits(post, view, carry, tokens, is_masked, start)
        tokens = jnp.where(commit, prediction, tokens)
        step_of_row = step if not step.ndim else step[:, None]
        commit_step = jnp.where(commit, step_of_row, commit_step)
        if taken is not None:
            tokens = jnp.where(is_back, self.mask_id, tokens)
            commit_step = jnp.where(is_back, -1, commit_step)
        extras = dict(carry.extras)
        if post is not None:
            tokens = jnp.where(edit, prediction, tokens)
            writes = {'edits': prediction, 'edit_log_prob': records['log_prob']}
            records = {name: records[name] for name in config.records} | {'draft': prediction}
            extras |= self._with_writes(extras, writes, edit, steps.turn, start)
        for name, value in records.items():
            before = cut(extras[name], start, config.block_length)
            chosen = commit.reshape(commit.shape + (1,) * (value.ndim - 2))
            extras[name] = put(extras[name], jnp.where(chosen, value, before), start)
        carry = carry.replace(
            tokens=put(carry.tokens, tokens, self.prompt_length + start),
            commit_step=put(carry.commit_step, commit_step, start),
            extras=extras,
        )
        return steps.replace(turn=steps.turn + 1, carry=carry, taken=taken, post=post, cache=cache)

    def _take_back(
        self, steps: Steps, carry: Carry, commit_step: Array, is_masked: Array, start: Array
    ) -> tuple[Array, Array]:
        """The tokens [B, b] that become MASK again, and how many each row has taken back, [B]."""
        config = self.config
        # A row whose block is finished waits, and does not begin to take tokens back.
        committed = (commit_step >= 0) & is_masked.any(-1)[:, None]  # [B, b]
        is_last = steps.turn + 1 == config.steps_per_block
        is_back = jax.vmap(rules.least_sure, (0, 0, 0, None))(  # [B, b]
            cut(carry.extras['confidence'], start, config.block_length),
            committed,
            jnp.where(is_last, 0, config.remasks - steps.taken),
            config,
        )
        return is_back, steps.taken + is_back.sum(-1)

    def _choose_edits(
        self,
        post: Array,
        view: rules.View,
        carry: Carry,
        tokens: Array,
        is_masked: Array,
        start: Array,
    ) -> tuple[Array, Array]:
        """The tokens [B, b] that are rewritten, and the rounds without MASK that are left, [B]."""
        edit = jax.vmap(self.config.rule.edit, (0, 0, None))(view, tokens, self.config)  # [B, b]
        edit &= ~is_masked & (is_masked.any(-1) | (post > 0))[:, None]
        edit &= tokens != self.mask_id  # Masks of a row that is past its last block stay.
        if carry.block.ndim:
            edit &= (carry.block < self.config.blocks)[:, None]
        if self.generated is not None:
            edit &= cut(self.generated, start, self.config.block_length)
        # A round without MASK is the last one if it changes nothing.
        return edit, jnp.where(is_masked.any(-1), post, jnp.where(edit.any(-1), post - 1, 0))

    def _with_writes(
        self,
        extras: dict[str, Array],
        writes: dict[str, Array],
        edit: Array,
        turn: Array,
        start: Array,
    ) -> dict[str, Array]:
        """The records [B, C, R] of edits by name, with what was written in this round, [B, b]."""
        written = {}
        for name, value in writes.items():
            before = cut(extras[name], start, self.config.block_length)  # [B, b, R]
            is_turn = jnp.arange(before.shape[-1])[None, None, :] == turn
            is_now = edit[:, :, None] & is_turn
            after = jnp.where(is_now, value[:, :, None], before)
            written[name] = put(extras[name], after, start)
        return written

    def _look(
        self, steps: Steps, step: Array, start: Array, is_first: bool
    ) -> tuple[Carry, Array, Any]:
        """The logits [B, b, V] of the block at `start`, after noting what changed around it.

        To measure influence, the pass also reads the positions of the next blocks that are near
        enough to be influenced, and gives the tokens of the step before their influence.
        """
        carry, config = steps.carry, self.config
        if self.cached:
            states, cache = self._look_with_cache(steps, start, is_first)
            return carry, self.unembed_fn(states), cache
        size, window = config.block_length, config.positions_read  # b, W
        if carry.confidence is None:
            return carry, self._logits(carry.tokens, start, size), None
        first = jnp.minimum(start, config.length - window)  # [] or [B]
        logits = self._logits(carry.tokens, first, window)  # [B, W, V]
        best = jnp.where(self.allowed[None, None, :], logits, -jnp.inf).max(-1)  # [B, W]
        confidence = put(carry.confidence, jnp.exp(best - jax.nn.logsumexp(logits, axis=-1)), first)
        change = informed.change_around(
            carry.confidence,
            confidence,
            carry.tokens[:, self.prompt_length :] == self.mask_id,
            config.influence_window,
        )
        before = (step if not step.ndim else step[:, None]) - 1
        is_latest = (carry.commit_step == before) & (carry.commit_step >= 0)
        influence = jnp.where(is_latest, change, carry.extras['influence'])
        extras = carry.extras | {'influence': influence}
        carry = carry.replace(extras=extras, confidence=confidence)
        return carry, cut(logits, start - first, size), None

    def _look_with_cache(self, steps: Steps, start: Array, is_first: bool) -> tuple[Array, Any]:
        """Hidden states [B, b, D] of the block at `start`, and the cache after the pass."""
        config, tokens = self.config, steps.carry.tokens
        place = self.prompt_length + start  # [] or [B]

        block = Window(0, config.block_length)

        def refresh(cache: Any) -> tuple[Array, Any]:
            window = block._replace(start=place)
            return self.cached.read(tokens, self.valid, cache, jnp.int32(0), window)

        def dual(cache: Any) -> tuple[Array, Any]:
            of_block = cut(tokens, place, config.block_length)
            return self.cached.read(of_block, self.valid, cache, place, block)

        def prefix(number: int, cache: Any) -> tuple[Array, Any]:
            # How much is read must be known to the compiler, so each block has a branch.
            first = self.prompt_length + number * config.block_length
            rest = tokens[:, first:]
            return self.cached.read(rest, self.valid, cache, jnp.int32(first), block)

        def suffix(cache: Any) -> tuple[Array, Any]:
            branches = [lambda cache, j=j: prefix(j, cache) for j in range(config.blocks)]
            return jax.lax.switch(steps.carry.block, branches, cache)

        reuse = dual if config.cache == 'dual' else suffix
        if is_first:
            return refresh(steps.cache)
        if config.refresh >= config.rounds_per_block:
            return reuse(steps.cache)
        return jax.lax.cond(steps.turn % config.refresh == 0, refresh, reuse, steps.cache)

    def _logits(self, tokens: Array, start: Array, size: int) -> Array:
        """The logits, with guidance, of `size` completion positions from `start`, [B, size, V]."""
        return self.logits_of(self.hidden_of(tokens, start, size))

    def hidden_of(self, tokens: Array, start: Array | int, size: int) -> tuple[Array, ...]:
        """The hidden states [B, size, D] of completion positions from `start` on, and with guidance
        those of sequences without prompts."""
        window = Window(self.prompt_length + start, size)
        conditional = self.hidden_fn(tokens, self.valid, window)
        if self.config.guidance == 0.0:
            return (conditional,)
        promptless = tokens.at[:, : self.prompt_length].set(self.mask_id)
        if self.generated is not None:
            completion = promptless[:, self.prompt_length :]
            completion = jnp.where(self.generated, completion, self.mask_id)
            promptless = promptless.at[:, self.prompt_length :].set(completion)
        return conditional, self.hidden_fn(promptless, self.valid, window)

    def logits_of(self, hidden: tuple[Array, ...]) -> Array:
        """The logits [B, size, V], with guidance, of the states [B, size, D] of `hidden_of`."""
        conditional, *others = map(self.unembed_fn, hidden)
        if not others:
            return conditional
        return others[0] + (1.0 + self.config.guidance) * (conditional - others[0])


def compacted_sizes(rows: int) -> tuple[int, ...]:
    """The numbers of rows that a batch of B = `rows` can shrink to, ascending; the last is B."""
    return tuple(sorted({-(-rows // share) for share in SHARES}))


def is_generated_eos(completion: Array, eos_id: int, generated: Array | None) -> Array:
    """Where a completion has an EOS that was not given: [B, C] -> [B, C] bool.

    Args:
      completion: [B, C] int32.
      eos_id: the end-of-sequence token.
      generated: [B, C] bool, False on given tokens; None is all.
    """
    is_eos = completion == eos_id
    return is_eos if generated is None else is_eos & generated
