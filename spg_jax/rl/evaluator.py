"""Accuracy of a policy by the published protocol: temperature 0, low-confidence commitment, fixed lengths."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from jax.sharding import Mesh

from spg_jax.config import evaluation_lengths, evaluation_sampling
from spg_jax.data import encode_prompts
from spg_jax.models.policy import Policy
from spg_jax.random import Purpose, example_ids, example_keys
from spg_jax.rl.rollout import decode, make_generate
from spg_jax.sharding import put_batch
from spg_jax.tasks.task import Score, Task
from spg_jax.tokenizers import Tokenizer


class Figures(NamedTuple):
    """What one evaluation found, all fractions in [0, 1]."""

    accuracy: float       # items right over items asked for, pooled over all problems
    correct: int
    total: int
    solved: float         # problems right altogether: for Sudoku the grids, else the accuracy
    reward: float         # mean training reward


class Evaluator:
    """Decodes and scores problems with a policy's current parameters; compiled once a length."""

    def __init__(self, policy: Policy, task: Task, tokenizer: Tokenizer, config: ml_collections.ConfigDict, mesh: Mesh):
        self._policy, self._task, self._tokenizer = policy, task, tokenizer
        self._config, self._mesh = config, mesh
        self._programs: dict[Any, Any] = {}

    def report(self, params: Any, examples: Sequence[Any]) -> dict[str, Any]:
        """JSON figures of the best length: greedy accuracy at every length, and pass@k at that one."""
        by_length = {
            length: self.greedy(params, examples, length, steps)
            for length, steps in evaluation_lengths(self._config)
        }
        best = max(by_length, key=lambda length: by_length[length].accuracy)
        samples = self._config.evaluation.samples
        steps = dict(evaluation_lengths(self._config))[best]
        return self._json(by_length[best]) | {
            'scorer': self._task.scorer,
            'length': best,
            'accuracy_by_length': {str(length): found.accuracy for length, found in by_length.items()},
            f'pass_at_{samples}': self.pass_at(params, examples, best, steps, samples),
        }

    def validate(self, params: Any, examples: Sequence[Any]) -> dict[str, Any]:
        """JSON figures at the first length, greedy: cheap enough to come often."""
        return self._json(self.greedy(params, examples, *evaluation_lengths(self._config)[0]))

    def _json(self, found: Figures) -> dict[str, Any]:
        figures = {'accuracy': found.accuracy, 'reward': found.reward, 'correct': found.correct, 'total': found.total}
        return figures | ({'grid_accuracy': found.solved} if self._task.name == 'sudoku' else {})

    def greedy(self, params: Any, examples: Sequence[Any], length: int, steps: int) -> Figures:
        """Figures at temperature 0."""
        texts = self.complete(params, examples, length, steps, temperature=0.0, samples=1)
        return self.figures(texts, examples)

    def pass_at(self, params: Any, examples: Sequence[Any], length: int, steps: int, samples: int) -> float:
        """Share of problems that at least one of `samples` completions solves, at the rollout's temperature."""
        texts = self.complete(params, examples, length, steps, self._config.sampling.temperature, samples)
        solved = [
            self._task.score(text, examples[row // samples]).solved for row, text in enumerate(texts)
        ]
        return float(np.reshape(solved, (-1, samples)).any(axis=1).mean())

    def complete(
        self, params: Any, examples: Sequence[Any], length: int, steps: int, temperature: float, samples: int
    ) -> list[str]:
        """`samples` completions of each example, next to each other."""
        key = (length, steps, temperature)
        if key not in self._programs:
            self._programs[key] = make_generate(
                self._policy, evaluation_sampling(self._config, length, steps, temperature)
            )
        generate, batch = self._programs[key], self._config.evaluation.batch
        prompts = encode_prompts(self._task, self._tokenizer, examples, self._config.sampling.prompt_length)
        rows = {
            'prompt': np.repeat(prompts.prompt, samples, axis=0),
            'prompt_mask': np.repeat(prompts.prompt_mask, samples, axis=0),
            'example_id': np.asarray(example_ids(prompts.index, samples)),
        }
        texts: list[str] = []
        for first in range(0, len(rows['prompt']), batch):
            some = {name: _fill(x[first : first + batch], batch) for name, x in rows.items()}
            some = put_batch(self._mesh, some)
            keys = example_keys(self._config.train.seed, Purpose.EVALUATE, 0, some['example_id'])
            completion = generate(params, some['prompt'], some['prompt_mask'], keys)
            texts += decode(self._tokenizer, completion.tokens)
        return texts[: len(examples) * samples]

    def figures(self, texts: Sequence[str], examples: Sequence[Any]) -> Figures:
        """Scores and rewards of one completion an example."""
        scores = [self._task.score(text, example) for text, example in zip(texts, examples, strict=True)]
        rewards = [self._task.reward(text, example) for text, example in zip(texts, examples, strict=True)]
        return pooled(scores, rewards)


def pooled(scores: Sequence[Score], rewards: Sequence[float]) -> Figures:
    """Items pooled over problems, as published for Sudoku; elsewhere a problem is one item."""
    correct, total = sum(score.right for score in scores), sum(score.total for score in scores)
    return Figures(
        accuracy=correct / max(total, 1),
        correct=correct,
        total=total,
        solved=float(np.mean([score.solved for score in scores])),
        reward=float(np.mean(rewards)),
    )


def _fill(x: np.ndarray, rows: int) -> np.ndarray:
    """Repeats the last row up to `rows`, so that one program serves every batch."""
    return np.concatenate([x, np.repeat(x[-1:], rows - len(x), axis=0)])
