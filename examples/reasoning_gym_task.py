"""A data set of reasoning-gym as a task, with the scorer that comes with it.

pip install -e '.[reasoning-gym]'
python -m spg_jax.train --config=countdown:llada_8b --config.task.name=examples.reasoning_gym_task

The prompts are prose, so the task has no vocabulary and needs the tokenizer of a checkpoint.
"""

import functools
import math
from typing import Any

import reasoning_gym

from spg_jax.tasks import Example, Score, Task, extraction

DATASET, SIZE, SEED = 'mini_sudoku', 1000, 0  # any name in reasoning_gym.factory.DATASETS
LONGEST = 2000  # characters of an answer, so that no scorer has to read more


@functools.cache
def dataset() -> Any:
    return reasoning_gym.create_dataset(DATASET, size=SIZE, seed=SEED)


class ReasoningGym(Task):
    """Examples: the entries of the data set, {'question', 'answer', 'metadata'}."""

    scorer = 'reasoning-gym'

    def problems(self) -> list[Example]:
        return list(dataset())

    def prompt(self, example: Example) -> str:
        return f'{example["question"]}\nWrite <answer>, your response, and </answer>.'

    def reward(self, completion: str, example: Example) -> float:
        """Returns the scorer's share in [0, 1] of the last answer tag; a scorer that fails gives 0.

        Scorers that evaluate an expression, such as that of 'countdown', may never return on
        hostile text. That of 'mini_sudoku' only compares cells.
        """
        answer = (extraction.last_answer(completion) or '').strip()
        try:
            reward = float(dataset().score_answer(answer[:LONGEST], example))
        except Exception:
            return 0.0
        return reward if math.isfinite(reward) else 0.0

    def score(self, completion: str, example: Example) -> Score:
        solved = self.reward(completion, example) == 1.0
        return Score(right=int(solved), total=1, solved=solved)

    def right_answer(self, example: Example) -> str:
        return f'<answer>\n{example["answer"]}\n</answer>'
