"""Accuracy of a policy by the published protocol: temperature 0, low-confidence commitment."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from spg_jax.config import evaluation_lengths, evaluation_sampling, prompt_buckets
from spg_jax.data.batches import left_pad, padded_length, prompt_tokens
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.models.policy import Policy, Variables
from spg_jax.process import distributed
from spg_jax.random import Purpose, example_keys
from spg_jax.rl.rollout import Generate, decode, make_generate
from spg_jax.sharding import own_rows, own_values, put_batch, row_shards
from spg_jax.tasks.task import Example, Score, Task

Figures = dict[str, Any]  # JSON values; accuracies are fractions in [0, 1]


class _Rows(NamedTuple):
    """Completions that this process has looked at."""

    total: int  # rows over all processes
    rows: np.ndarray  # [n] their numbers, ascending
    tokens: np.ndarray  # [n, C] int32

    def complete(self, values: np.ndarray) -> np.ndarray:
        """What all processes found: values [n, ...] of the own rows -> [total, ...]."""
        every = np.zeros((self.total, *values.shape[1:]), values.dtype)
        known = np.zeros(self.total, bool)
        every[self.rows], known[self.rows] = values, True
        return distributed.merge(every, known)


class Evaluator:
    """Decodes and scores problems with a policy's current parameters; compiled once a length."""

    def __init__(
        self,
        policy: Policy,
        task: Task,
        tokenizer: Tokenizer,
        config: ml_collections.ConfigDict,
        mesh: Mesh,
    ):
        self._policy, self._task, self._tokenizer = policy, task, tokenizer
        self._config, self._mesh = config, mesh
        self._programs: dict[tuple[int, int, float], Generate] = {}
        self._keys = jax.jit(example_keys, static_argnums=(0, 1, 2))

    def report(self, variables: Variables, examples: Sequence[Example]) -> Figures:
        """Figures at the headline length, its pass@k, and the accuracy at every length."""
        headline, steps = headline_length(self._config)
        found = {
            length: self.greedy(variables, examples, length, steps)
            for length, steps in evaluation_lengths(self._config)
        }
        samples = self._config.evaluation.samples
        return found[headline] | {
            'length': headline,
            'accuracy_by_length': {str(length): found[length]['accuracy'] for length in found},
            f'pass_at_{samples}': self.pass_at(variables, examples, headline, steps, samples),
        }

    def validate(self, variables: Variables, examples: Sequence[Example]) -> Figures:
        """Figures at the headline length only: cheap enough to come often."""
        return self.greedy(variables, examples, *headline_length(self._config))

    def greedy(
        self, variables: Variables, examples: Sequence[Example], length: int, steps: int
    ) -> Figures:
        """The task's figures and the mean reward, at temperature 0."""
        mine = self._generate(variables, examples, length, steps, temperature=0.0, samples=1)
        texts = decode(self._tokenizer, mine.tokens)
        rewards = [
            self._task.reward(text, examples[row])
            for row, text in zip(mine.rows, texts, strict=True)
        ]
        figures = self._task.figures(self._scores(mine, examples, samples=1))
        return figures | {'reward': float(mine.complete(np.array(rewards)).mean())}

    def pass_at(
        self,
        variables: Variables,
        examples: Sequence[Example],
        length: int,
        steps: int,
        samples: int,
    ) -> float:
        """Share of problems solved by at least one of `samples` completions, sampled as in
        rollouts."""
        temperature = self._config.sampling.temperature
        mine = self._generate(variables, examples, length, steps, temperature, samples)
        solved = [score.solved for score in self._scores(mine, examples, samples)]
        return float(np.reshape(solved, (-1, samples)).any(axis=1).mean())

    def _scores(self, mine: _Rows, examples: Sequence[Example], samples: int) -> list[Score]:
        """The verdict on every row, each process scoring its own."""
        # Published scorers look for the end of the turn in the text; published rewards do not.
        specials = self._task.scorer == 'published'
        texts = decode(self._tokenizer, mine.tokens, keep_specials=specials)
        scores = [
            self._task.score(text, examples[row // samples])
            for row, text in zip(mine.rows, texts, strict=True)
        ]
        every = mine.complete(np.array(scores, np.int32).reshape(-1, len(Score._fields)))
        return [Score(int(right), int(total), bool(solved)) for right, total, solved in every]

    def complete(
        self,
        variables: Variables,
        examples: Sequence[Example],
        length: int,
        steps: int,
        temperature: float,
        samples: int,
    ) -> list[str]:
        """The texts of `samples` completions of each example, next to each other; of several
        processes, each gets its own."""
        mine = self._generate(variables, examples, length, steps, temperature, samples)
        return decode(self._tokenizer, mine.tokens)

    def _generate(
        self,
        variables: Variables,
        examples: Sequence[Example],
        length: int,
        steps: int,
        temperature: float,
        samples: int,
    ) -> _Rows:
        """Completions of N examples, N * samples rows of which each process gets its own."""
        program = (length, steps, temperature)
        if program not in self._programs:
            decoding = evaluation_sampling(self._config, length, steps, temperature)
            self._programs[program] = make_generate(self._policy, decoding)
        config, shards = self._config, row_shards(self._mesh)
        batch, total = -(-config.evaluation.batch // shards) * shards, len(examples) * samples
        first_rows, own = np.arange(0, total, batch), own_rows(self._mesh, batch)
        # The last batch is filled up with its last row, so that one program serves every batch.
        mine = np.minimum(first_rows[:, None] + own[None, :], total - 1)  # [batches, own]
        prompts = self._prompts(examples, np.unique(mine // samples))
        tokens = []
        for rows in mine:
            encoded = [prompts[row // samples] for row in rows]
            index = [examples[row // samples]['index'] for row in rows]
            member = (rows % samples).astype(np.uint32)
            some = put_batch(
                self._mesh,
                {
                    'prompt': np.stack([prompt for prompt, _ in encoded]),
                    'prompt_mask': np.stack([valid for _, valid in encoded]),
                    'example_id': np.array(index, np.uint32) * np.uint32(samples) + member,
                },
            )
            keys = self._keys(config.train.seed, Purpose.EVALUATE, 0, some['example_id'])
            completion = self._programs[program](
                variables, some['prompt'], some['prompt_mask'], keys
            )
            tokens.append(own_values(completion.tokens))
        rows, first = np.unique(mine, return_index=True)  # without the filling
        return _Rows(total, rows, np.concatenate(tokens)[first])

    def _prompts(
        self, examples: Sequence[Example], places: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Tokens and validity, each [P], of the prompts at these places. None is left out or cut,
        however long: an accuracy over fewer or other problems is another one."""
        rows = [prompt_tokens(self._task, self._tokenizer, examples[place]) for place in places]
        longest = distributed.largest(max(map(len, rows), default=0))
        length = padded_length(longest, prompt_buckets(self._config))
        encoded = left_pad(rows, length, self._tokenizer.pad_id)
        return dict(zip(places.tolist(), zip(*encoded, strict=True), strict=True))


def headline_length(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """(length, steps) whose figures choose checkpoints and stand for the policy: the length it was
    trained at if it is evaluated at that, else the first. Never the one that is best on the test.
    """
    lengths = evaluation_lengths(config)
    return next((pair for pair in lengths if pair[0] == config.sampling.length), lengths[0])
