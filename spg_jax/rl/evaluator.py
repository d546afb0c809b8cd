"""Accuracy of a policy by the published protocol: temperature 0, low-confidence commitment."""

from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from spg_jax.config import evaluation_lengths, evaluation_sampling
from spg_jax.data import encode_prompts
from spg_jax.models.policy import Policy, Variables
from spg_jax.random import Purpose, example_ids, example_keys
from spg_jax.rl.rollout import Generate, decode, make_generate
from spg_jax.sharding import put_batch, row_shards
from spg_jax.tasks.task import Example, Task
from spg_jax.tokenizers import Tokenizer

Figures = dict[str, Any]  # JSON values; accuracies are fractions in [0, 1]


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
        tokens = self._generate(variables, examples, length, steps, temperature=0.0, samples=1)
        pairs = zip(decode(self._tokenizer, tokens), examples, strict=True)
        rewards = [self._task.reward(text, example) for text, example in pairs]
        pairs = zip(self._scored_texts(tokens), examples, strict=True)
        figures = self._task.figures([self._task.score(text, example) for text, example in pairs])
        return figures | {'reward': float(np.mean(rewards))}

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
        tokens = self._generate(variables, examples, length, steps, temperature, samples)
        solved = [
            self._task.score(text, examples[row // samples]).solved
            for row, text in enumerate(self._scored_texts(tokens))
        ]
        return float(np.reshape(solved, (-1, samples)).any(axis=1).mean())

    def _scored_texts(self, tokens: np.ndarray) -> list[str]:
        # Published scorers look for the end of the turn in the text; published rewards do not.
        return decode(self._tokenizer, tokens, keep_specials=self._task.scorer == 'published')

    def complete(
        self,
        variables: Variables,
        examples: Sequence[Example],
        length: int,
        steps: int,
        temperature: float,
        samples: int,
    ) -> list[str]:
        """The texts of `samples` completions of each example, next to each other."""
        return decode(
            self._tokenizer,
            self._generate(variables, examples, length, steps, temperature, samples),
        )

    def _generate(
        self,
        variables: Variables,
        examples: Sequence[Example],
        length: int,
        steps: int,
        temperature: float,
        samples: int,
    ) -> np.ndarray:
        """Completion tokens [N * samples, C] of N examples."""
        program = (length, steps, temperature)
        if program not in self._programs:
            decoding = evaluation_sampling(self._config, length, steps, temperature)
            self._programs[program] = make_generate(self._policy, decoding)
        config, shards = self._config, row_shards(self._mesh)
        batch = -(-config.evaluation.batch // shards) * shards
        prompts = encode_prompts(
            self._task,
            self._tokenizer,
            examples,
            config.sampling.prompt_length,
            truncate=config.data.long_prompts == 'truncate_left',
        )
        rows = {
            'prompt': np.repeat(prompts.prompt, samples, axis=0),
            'prompt_mask': np.repeat(prompts.prompt_mask, samples, axis=0),
            'example_id': np.asarray(example_ids(prompts.index, samples)),
        }
        tokens = []
        for first in range(0, len(rows['prompt']), batch):
            some = {name: _fill(x[first : first + batch], batch) for name, x in rows.items()}
            some = put_batch(self._mesh, some)
            keys = example_keys(config.train.seed, Purpose.EVALUATE, 0, some['example_id'])
            completion = self._programs[program](
                variables, some['prompt'], some['prompt_mask'], keys
            )
            tokens.append(np.asarray(completion.tokens))
        return np.concatenate(tokens)[: len(examples) * samples]


def headline_length(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """(length, steps) whose figures choose checkpoints and stand for the policy: the length it was
    trained at if it is evaluated at that, else the first. Never the one that is best on the test.
    """
    lengths = evaluation_lengths(config)
    return next((pair for pair in lengths if pair[0] == config.sampling.length), lengths[0])


def _fill(x: np.ndarray, rows: int) -> np.ndarray:
    """Repeats the last row up to `rows`, so that one program serves every batch."""
    return np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)])
