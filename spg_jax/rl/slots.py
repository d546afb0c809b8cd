"""Generation in slots: rows that have ended leave the batch between blocks, and others move in.

The host looks at the batch after each block. A row that has ended is taken out. While rows wait,
the next one takes its slot, so that rows of one batch are in different blocks. When none waits and
few rows are left, the batch is compacted to the smallest of a few sizes that holds them. Within a
block, rows that have finished it leave in the same way until the others have. The rows of a group
begin with equal tokens, so that one pass for each group opens the first batch. The tokens of a row
depend on its prompt and its key alone, so they are those of `sampling.generate`.

Slots are for one shard of rows. Over several shards each would have to keep as many rows as the
others, and rows of long completions would move between devices; there whole batches are generated.

Letters of axes: `N` rows in all, `B` slots, `P` tokens of a prompt, `C` positions of a completion.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh

from spg_jax.diffusion import sampling
from spg_jax.models.policy import Policy, Variables
from spg_jax.models.windows import Window
from spg_jax.sharding import constrain_rows, own_values, row_shards

# Which of the N rows have ended, [n], and their completions, whose rows after the first n are
# fillers: a part of all rows.
Part = tuple[np.ndarray, sampling.Completion]


@struct.dataclass
class Slots:
    """The rows under way."""

    prompt_mask: Array  # [B, P] bool
    keys: Array  # [B]
    carry: sampling.Carry


def can_stream(policy: Policy, config: sampling.SamplingConfig, mesh: Mesh) -> bool:
    """Whether completions can be generated in slots: rows end early, on one shard of rows.

    Models that see blocks, the autoregressive ones among them, have no slots: their blocks are
    counted from the prompt, or have one token.
    """
    processes = {device.process_index for device in mesh.devices.flat}
    alone = row_shards(mesh) == len(processes) == 1
    return config.stop_early and alone and not policy.config.visible_block


def can_refill(config: sampling.SamplingConfig) -> bool:
    """Whether rows of a batch may be in different blocks, which the prefix cache does not allow."""
    return config.cache != 'prefix'


def functions_of(
    policy: Policy, variables: Variables
) -> tuple[Callable[[Array, Array, Window], Array], Callable[[Array], Array], sampling.CachedModel]:
    """What the sampler needs of a policy: its hidden states, its logits, and its cache."""
    cached = sampling.CachedModel(
        empty=policy.empty_cache,
        take=policy.take_from_cache,
        read=lambda *arguments: policy.hidden_with_cache(variables, *arguments),
    )

    def hidden(tokens: Array, valid: Array, window: Window) -> Array:
        return policy.hidden(variables, tokens, valid, window=window)

    return hidden, lambda hidden: policy.unembed(variables, hidden), cached


def make_stream(
    policy: Policy, config: sampling.SamplingConfig, slots: int, group_size: int = 1
) -> Callable[[Variables, Array, Array, Array], Iterator[Part]]:
    """A function (variables, prompt [N, P], prompt_mask [N, P], keys [N]) that yields parts.

    A part is yielded after the next block was started, so that the host has time for it.

    Args:
      policy: the model.
      config: how completions are decoded; with `stop_early` False no row ends before the others.
      slots: B, the rows that are generated at once.
      group_size: how many rows, one after another, have the same prompt.
    """

    @jax.jit
    def begin(prompt: Array, prompt_mask: Array, keys: Array, block: Array) -> Slots:
        carry = sampling.begin(
            prompt, prompt_mask, keys, config, policy.mask_id, policy.allowed.size, block
        )
        return constrain_rows(Slots(prompt_mask, keys, carry))

    def decoder_of(variables: Variables, slots: Slots) -> sampling.Decoder:
        hidden, unembed, cached = functions_of(policy, variables)
        return sampling.decoder_of(
            hidden,
            unembed,
            slots.prompt_mask,
            slots.keys,
            config,
            policy.mask_id,
            policy.eos_id,
            policy.allowed,
            cached,
            compact=True,
        )

    @partial(jax.jit, static_argnames='sharing')
    def start(variables: Variables, slots: Slots, sharing: int) -> sampling.Steps:
        steps = decoder_of(variables, slots).start(slots.carry, sharing)
        return steps.replace(carry=constrain_rows(steps.carry))

    @jax.jit
    def finish(variables: Variables, slots: Slots, steps: sampling.Steps) -> tuple[Slots, Array]:
        decoder = decoder_of(variables, slots)
        carry = decoder.finish(steps)
        return constrain_rows(slots.replace(carry=carry)), decoder.ended(carry)

    @jax.jit
    def take(slots: Slots, index: Array) -> Slots:
        return jax.tree.map(lambda x: x[index] if x.ndim else x, slots)

    @jax.jit
    def completion(variables: Variables, slots: Slots, index: Array) -> sampling.Completion:
        ended = take(slots, index)
        return sampling.finish(decoder_of(variables, ended), ended.carry)

    @jax.jit
    def refill(slots: Slots, fresh: Slots, is_fresh: Array) -> Slots:
        def choose(new: Array, old: Array) -> Array:
            return jnp.where(is_fresh.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return jax.tree.map(choose, fresh, slots)

    def stream(
        variables: Variables, prompt: Array, prompt_mask: Array, keys: Array
    ) -> Iterator[Part]:
        total = len(prompt)
        size = min(slots, total)
        sizes = sampling.compacted_sizes(size)
        # With rows in different blocks every slot has its own block, else all have one.
        block = np.zeros(size if total > size else (), np.int32)
        rows = np.arange(size)  # [B] the row in each slot, -1 in an empty one
        waiting = iter(range(size, total))
        state = begin(prompt[:size], prompt_mask[:size], keys[:size], block)
        sharing = group_size if size % group_size == 0 else 1
        ready: list[Part] = []
        while (rows >= 0).any():
            with jax.profiler.TraceAnnotation('generate'):
                state, ended = finish(variables, state, start(variables, state, sharing))
            sharing = 1  # Rows differ from here on.
            yield from ready
            ready = []
            done = np.flatnonzero(np.asarray(ended) & (rows >= 0))
            if not len(done):
                continue
            index = _filled(done, sizes)
            ready = [(rows[done], completion(variables, state, index))]
            rows[done] = -1
            fresh = [row for _, row in zip(done, waiting, strict=False)]
            if fresh:
                rows[done[: len(fresh)]] = fresh
                # Slots that are not filled get some row, which `refill` leaves out.
                source = np.where(np.isin(rows, fresh), rows, 0)
                entries = (prompt[source], prompt_mask[source], keys[source])
                state = refill(state, begin(*entries, block), np.isin(rows, fresh))
                continue
            live = np.flatnonzero(rows >= 0)
            index = _filled(live, sizes) if len(live) else rows
            if len(index) < len(rows):
                state = take(state, index)
                rows = np.append(rows[live], np.full(len(index) - len(live), -1))
        yield from ready

    return stream


def in_order(
    stream: Callable[[Variables, Array, Array, Array], Iterator[Part]],
) -> Callable[[Variables, Array, Array, Array], sampling.Completion]:
    """A function of the arguments of a stream that returns all N completions, in host arrays."""

    def generate(*arguments: Any) -> sampling.Completion:
        rows, parts = zip(*map(_on_host, stream(*arguments)), strict=True)
        back = np.argsort(np.concatenate(rows))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[back], *parts)

    return generate


def _on_host(part: Part) -> Part:
    """The part in host arrays, without fillers."""
    rows, completion = part
    return rows, jax.tree.map(lambda x: own_values(x)[: len(rows)], completion)


def _filled(index: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """An index [n] with its first entry repeated up to the next of some sizes."""
    size = next(size for size in sizes if size >= len(index))
    return np.append(index, np.full(size - len(index), index[0]))
