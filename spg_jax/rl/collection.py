"""Collecting a rollout: a batch of prompts becomes groups of completions with rewards."""

import dataclasses
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from spg_jax.data.batches import PromptBatch
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.diffusion import sampling
from spg_jax.diffusion.corruption import scored_positions
from spg_jax.diffusion.prompt_grid import generate_on_prompt_grid
from spg_jax.diffusion.samplers.editing import DRAFT
from spg_jax.models.policy import Policy, Variables
from spg_jax.models.transformer import TransformerConfig
from spg_jax.random import Purpose, Seeded, example_ids, example_keys
from spg_jax.rl.batching import Batching
from spg_jax.rl.objectives.objective import Advantage
from spg_jax.rl.rollout import DRAFT_REWARD, DRAFT_SCORED, Rollout
from spg_jax.rl.slots import Part, can_refill, can_stream, functions_of, make_stream
from spg_jax.sharding import constrain, constrain_rows, own_rows, own_values, put_batch
from spg_jax.tasks import reading
from spg_jax.tasks.task import Example, Task

Generate = Callable[[Variables, Array, Array, Array], sampling.Completion]


def make_generate(policy: Policy, config: sampling.SamplingConfig) -> Generate:
    """A compiled (variables, prompt [B, P], prompt_mask [B, P], keys [B]) -> Completion.

    The rows of the result are split over devices as the rows of the prompts are.

    Raises:
      ValueError: if the model cannot decode in this way.
    """
    config = decoding_of(policy.config, config)
    on_grid = policy.config.visible_block > 1
    sample = generate_on_prompt_grid if on_grid else sampling.generate

    @jax.jit
    def generate(
        variables: Variables, prompt: Array, prompt_mask: Array, keys: Array
    ) -> sampling.Completion:
        hidden, unembed, cached = functions_of(policy, variables)
        completion = sample(
            hidden,
            unembed,
            prompt,
            prompt_mask,
            keys,
            config,
            policy.mask_id,
            policy.eos_id,
            policy.allowed,
            cached,
        )
        return constrain_rows(completion)

    return generate


def decoding_of(
    model: TransformerConfig, config: sampling.SamplingConfig
) -> sampling.SamplingConfig:
    """How a model decodes completions of the configured length.

    An autoregressive model commits one token after the other, whatever is configured.

    Raises:
      ValueError: if the model sees blocks of another length than those that are decoded, or cannot
        keep keys and values.
    """
    if model.autoregressive:
        return dataclasses.replace(
            config,
            steps=config.length,
            block_length=1,
            commit='left_to_right',
            sampler='',
            schedule='even',
            cache='',
        )
    if model.visible_block and config.block_length != model.visible_block:
        raise ValueError(
            f'block_length is {config.block_length}, but positions of this model see blocks of '
            f'{model.visible_block}; set sampling.block_length and evaluation.block_length to '
            f'{model.visible_block}'
        )
    if config.cache and (model.visible_block or model.shift_logits or model.experts):
        raise ValueError(
            f'sampling.cache is {config.cache!r}, which models of the family {model.family} do not '
            "have here; use sampling.cache ''"
        )
    return config


def make_keys(seed: int, purpose: Purpose) -> Callable[[int, Array], Array]:
    """A compiled (step, example_id [B]) -> keys [B] of rows.

    The keys lie where the prompts lie, whoever asks for them, so that rollouts and samples of an
    evaluation, whose programs are equal, are compiled once.
    """
    return Seeded(
        lambda seed, step, ids: constrain(example_keys(seed, purpose, step, ids), 'rows'), seed
    )


def decode(tokenizer: Tokenizer, completion: np.ndarray, keep_specials: bool = False) -> list[str]:
    """The text of each row [C] of tokens through its first EOS, with or without special tokens."""
    rows = np.asarray(completion).tolist()
    eos = tokenizer.eos_id
    rows = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return [tokenizer.decode(row, keep_specials) for row in rows]


def make_collect(
    policy: Policy,
    task: Task,
    tokenizer: Tokenizer,
    decoding: sampling.SamplingConfig,
    batching: Batching,
    advantage: Advantage,
    seed: int,
    mesh: Mesh,
) -> Callable[[Variables, PromptBatch, int], tuple[Rollout, list[str]]]:
    """A function (variables, prompts, step) -> (Rollout, texts) that samples, decodes and rewards.

    The prompts and the texts are those of this process, in whole groups; the rollout has the rows
    of all processes. Completions are generated in parts. While the devices work on one part, the
    host decodes and rewards the part before it. On one shard of rows, parts are what ends between
    two blocks (`slots`), and otherwise equal shares of the batch.

    Args:
      policy: the model.
      task: rewards the texts.
      tokenizer: the tokenizer of the policy.
      decoding: how completions are decoded.
      batching: the size of a group and of a part.
      advantage: of the objective, from the rewards of whole groups.
      seed: the root of the run's random numbers.
      mesh: the devices.
    """
    group_size = batching.group_size
    keys_of = make_keys(seed, Purpose.SAMPLE)
    rows_at_once = len(own_rows(mesh, batching.rows_at_once))
    in_slots = batching.compact and can_stream(policy, decoding, mesh)
    if in_slots:
        stream = make_stream(policy, decoding, rows_at_once, group_size)
    else:
        generate = make_generate(policy, decoding)

    def generated(variables: Variables, rows: dict[str, np.ndarray], step: int) -> Iterator[Part]:
        """The completions of all rows, in parts, each yielded while the next is under way."""
        count = len(rows['prompt'])
        at_once = count if in_slots and can_refill(decoding) else rows_at_once
        for first in range(0, count, at_once):
            part = slice(first, first + at_once)
            placed = put_batch(mesh, {name: x[part] for name, x in rows.items()})
            keys = keys_of(step, placed['example_id'])
            arguments = variables, placed['prompt'], placed['prompt_mask'], keys
            if in_slots:
                yield from ((first + index, ended) for index, ended in stream(*arguments))
            else:
                with jax.profiler.TraceAnnotation('generate'):
                    completion = generate(*arguments)
                yield np.arange(first, first + at_once), completion

    @partial(jax.profiler.annotate_function, name='decode and reward')
    def finish(
        completion: sampling.Completion, examples: Sequence[Example]
    ) -> tuple[dict[str, Any], list[str]]:
        completion = jax.tree.map(lambda x: own_values(x)[: len(examples)], completion)
        tokens = completion.tokens
        texts = decode(tokenizer, tokens)
        extras = dict(completion.extras)
        if DRAFT in extras:
            extras[DRAFT_REWARD] = rewards_of(decode(tokenizer, extras[DRAFT]), examples)
            extras[DRAFT_SCORED] = np.asarray(scored_positions(extras[DRAFT], policy.eos_id))
        rows = {
            'completion': tokens,
            'commit_step': completion.commit_step,
            'reward': rewards_of(texts, examples),
            'extras': extras,
        }
        return rows, texts

    def rewards_of(texts: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        rewards = [task.reward(text, each) for text, each in zip(texts, examples, strict=True)]
        check_rewards(task, rewards, texts)
        return np.asarray(rewards, np.float32)

    def collect(variables: Variables, prompts: PromptBatch, step: int) -> tuple[Rollout, list[str]]:
        rows = {
            'prompt': np.repeat(prompts.prompt, group_size, axis=0),
            'prompt_mask': np.repeat(prompts.prompt_mask, group_size, axis=0),
            'example_id': np.asarray(example_ids(prompts.index, group_size)),
        }
        examples = [example for example in prompts.examples for _ in range(group_size)]
        parts = generated(variables, rows, step)
        order, finished, texts = zip(
            *[
                (index, *finish(completion, [examples[row] for row in index]))
                for index, completion in (parts if in_slots else one_ahead(parts))
            ],
            strict=True,
        )
        back = np.argsort(np.concatenate(order))  # from the order of ending to that of the prompts
        rows |= jax.tree.map(lambda *parts: np.concatenate(parts)[back], *finished)
        texts = list(itertools.chain(*texts))
        rows['scored'] = np.asarray(scored_positions(rows['completion'], policy.eos_id))
        rows['advantage'] = np.asarray(advantage(rows['reward'], group_size))
        return Rollout(**put_batch(mesh, rows)), [texts[row] for row in back]

    return collect


def check_rewards(task: Task, rewards: Sequence[float], texts: Sequence[str]) -> None:
    """Refuses rewards that no update could use, which the task of a user may give by mistake.

    Raises:
      ValueError: a reward is no number, NaN, or infinite in float32.
    """
    largest = float(np.finfo(np.float32).max)
    for reward, text in zip(rewards, texts, strict=True):
        if not isinstance(reward, numbers.Real) or not abs(reward) <= largest:
            raise ValueError(
                f'the reward of task {task.name} is {reading.shown(reward)} for the completion '
                f'{reading.shown(text)}; return a finite number for every text'
            )


def one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """Yields each item after the next one was made, so that the work it started is under way."""
    iterator = iter(items)
    previous = next(iterator)
    for item in iterator:
        yield previous
        previous = item
    yield previous
