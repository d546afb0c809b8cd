"""SPG on GSM8K, word problems of primary school; most of the reward is for the right number.

python -m spg_jax.train --config=configs/gsm8k.py:llada_8b   # published recipe on LLaDA-8B
python -m spg_jax.plan --config=configs/gsm8k.py:llada_8b_v5e16 --topology=v5e:4x4

The problems are downloaded when they are first used. Without a network an error message says which
files to put where. Published result of SPG at 256 tokens, with a checkpoint chosen on the test set:
right answers rise from 77.2 % to 86.1 %.
"""

import ml_collections

from spg_jax.config import default_config
from spg_jax.presets import HARDWARE, on_llada_8b

PRESETS = tuple(HARDWARE)


def get_config(preset: str = 'llada_8b') -> ml_collections.ConfigDict:
    """The configuration of a preset; `default_config` says what each setting means."""
    if preset not in PRESETS:
        raise ValueError(
            f'configs/gsm8k.py has no preset {preset!r}: no base policy is trained from scratch on '
            f'word problems; use {", ".join(PRESETS)}, or configs/countdown.py for a laptop'
        )
    config = default_config()
    config.task.name = 'gsm8k'
    on_llada_8b(config, preset)
    return config
