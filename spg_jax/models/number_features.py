"""A start for embeddings of numbers: waves of their value, so that arithmetic need not begin from
nothing."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from spg_jax.models.policy import Params

# The short ones tell residues, such as parity and the last digit; the long ones tell size. Trained
# models find such waves by themselves (Nanda et al., arXiv 2301.05217), only later.
PERIODS = (2, 3, 4, 5, 7, 10, 20, 33, 50, 100, 200, 400)
WAVE_GAIN = 1.2  # times the standard deviation of the random embedding
NOISE_GAIN = 0.5


def with_number_features(params: Params, words: Sequence[str], first_id: int) -> Params:
    """Parameters whose embeddings of number words start with cosines and sines of the number.

    Args:
      params: of a `Transformer`; 'embedding' is [V, D] with D at least twice the number of PERIODS.
      words: the words of ids `first_id`, `first_id` + 1, ...; those that are no number stay as
        they are.

    Raises:
      ValueError: if the width is too small for the waves.
    """
    embedding = np.array(params['embedding'])
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
    return params | {'embedding': jnp.asarray(embedding, params['embedding'].dtype)}
