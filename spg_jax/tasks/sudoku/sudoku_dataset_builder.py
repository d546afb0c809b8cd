"""The Sudoku puzzles as a TFDS dataset; nothing is downloaded."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from spg_jax.tasks.sudoku import problems


class Builder(tfds.core.GeneratorBasedBuilder):
    """Puzzles of 4 x 4 with one solution each; splits share no solution. None is published."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {'puzzle': tfds.features.Text(), 'solution': tfds.features.Text()}
            ),
            # The puzzles are in random order already, and the place of one is its identity.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {split: self._generate_examples(part) for split, part in problems.generate().items()}

    def _generate_examples(
        self, part: list[tuple[str, str]]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        for index, (puzzle, solution) in enumerate(part):
            yield index, {'puzzle': puzzle, 'solution': solution}
