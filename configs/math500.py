"""SPG on competition problems (MATH, tested on MATH500); most reward is for the right formula.

python -m spg_jax.train --config=configs/math500.py:llada_8b   # published recipe on LLaDA-8B
python -m spg_jax.plan --config=configs/math500.py:llada_8b_v5e16 --topology=v5e:4x4

The problems are downloaded when they are first used. Without a network an error message says which
files to put where. Published result of SPG at 256 tokens, with a checkpoint chosen on the test set:
right answers rise from 32.4 % to 40.0 %.
"""

import ml_collections

from spg_jax.config import default_config
from spg_jax.presets import HARDWARE, on_llada_8b

PRESETS = tuple(HARDWARE)


def get_config(preset: str = 'llada_8b') -> ml_collections.ConfigDict:
    """The configuration of a preset; `default_config` says what each setting means."""
    if preset not in PRESETS:
        raise ValueError(
            f'configs/math500.py has no preset {preset!r}: no base policy is trained from scratch '
            f'on word problems; use {", ".join(PRESETS)}, or configs/countdown.py for a laptop'
        )
    config = default_config()
    config.task.name = 'math500'
    on_llada_8b(config, preset)
    config.train.steps = 4000  # [E] of default_config; all other settings have their defaults
    return config
