"""A task in one file: write three digits in ascending order. In the root of the repository:

python -m spg_jax.train --config=countdown:tiny --config.task.name=examples.own_task
"""

import itertools

from spg_jax.tasks import Example, Score, Task


class Sorting(Task):
    """Examples: {'digits': three different digits}; the answer to `7 2 5 :` is `2 5 7`."""

    # The rest is needed by every task; these three parts let a small model learn it from nothing.
    vocabulary = (*'0123456789', ':')

    def right_answer(self, example: Example) -> str:
        return ' '.join(map(str, sorted(example['digits'])))

    def shortcut_answer(self, example: Example) -> str:
        return ' '.join(map(str, example['digits']))

    def problems(self) -> list[Example]:
        return [{'digits': digits} for digits in itertools.permutations(range(10), 3)]

    def prompt(self, example: Example) -> str:
        return f'{" ".join(map(str, example["digits"]))} :'

    def reward(self, completion: str, example: Example) -> float:
        """Returns the share of places that are right, among three places or however many it has."""
        words, right = completion.split(), self.right_answer(example).split()
        return sum(map(str.__eq__, words, right)) / max(3, len(words))

    def score(self, completion: str, example: Example) -> Score:
        solved = completion.split() == self.right_answer(example).split()
        return Score(right=int(solved), total=1, solved=solved)
