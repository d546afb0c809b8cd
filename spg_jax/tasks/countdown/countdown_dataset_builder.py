"""The Countdown problems as a TFDS dataset; nothing is downloaded."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from spg_jax.tasks.countdown import problems


class Builder(tfds.core.GeneratorBasedBuilder):
    """Three numbers of 1..100 and a target of 1..100. None is in the published test."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    'numbers': tfds.features.Tensor(shape=(3,), dtype=np.int64),
                    'target': tfds.features.Scalar(dtype=np.int64),
                }
            ),
            # The problems are in random order already, and the place of one is its identity.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(part) for split, part in problems.generate().items()}

    def _generate_examples(
        self, part: list[problems.Problem]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (numbers, target) in enumerate(part):
            yield index, {'numbers': numbers, 'target': target}
