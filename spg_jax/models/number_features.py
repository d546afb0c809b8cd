"""Initial embeddings of numbers as waves of their value, which help a model to learn arithmetic."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from spg_jax.models.policy import Params

# Short periods tell residues, such as parity and the last digit; long periods tell size. Models
# trained without them find such waves by themselves (Nanda et al., arXiv 2301.05217), but later.
PERIODS = (2, 3, 4, 5, 7, 10, 20, 33, 50, 100, 200, 400)
WAVE_GAIN = 1.2  # amplitude of a wave over the standard deviation of the random embedding
NOISE_GAIN = 0.5  # share of the random embedding that stays beside the waves


def with_number_features(params: Params, words: Sequence[str], first_id: int) -> Params:
    """Parameters in which the embedding of a number word starts with cosines and sines of it.

    Args:
      params: parameters of a `Transformer`; 'embedding' is [V, D], where D is at least twice the
        number of PERIODS.
      words: the words of the ids `first_id`, `first_id` + 1, ...; the embeddings of words that are
        not numbers do not change.
      first_id: the id of the first word.

    Raises:
      ValueError: if the width is too small for the waves.
    """
    table = params['embedding']
    # Whole on every process, whoever holds which part of it.
    gathered = multihost_utils.process_allgather(table, tiled=True)
    embedding = np.array(gathered, np.float32)  # [V, D]
    waves = 2 * len(PERIODS)
    if embedding.shape[1] < waves:
        raise ValueError(
            f'model.width {embedding.shape[1]} is too small for number features; use at '
            f'least {waves}, or base.number_features False'
        )
    deviation = embedding.std()
    for id, word in enumerate(words, first_id):
        if word.isdecimal():
            angle = 2 * np.pi * int(word) / np.array(PERIODS)
            embedding[id] *= NOISE_GAIN
            embedding[id, :waves] = (
                WAVE_GAIN * deviation * np.concatenate([np.cos(angle), np.sin(angle)])
            )
    values = embedding.astype(table.dtype)
    place = jax.make_array_from_callback(values.shape, table.sharding, values.__getitem__)
    return params | {'embedding': place}
