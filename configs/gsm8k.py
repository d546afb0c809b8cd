"""SPG on GSM8K, word problems of primary school: the reward is mostly for the right number.

python -m spg_jax.train --config=configs/gsm8k.py:llada_8b   # published recipe; cannot load yet

The problems are downloaded on first use; without a network, the message says what to put where.
Published (SPG, 256 tokens): 77.2 % -> 86.1 % right, with a checkpoint chosen on the test.
"""

import ml_collections

from spg_jax.config import default_config

PRESETS = ('llada_8b',)


def get_config(preset: str = 'llada_8b') -> ml_collections.ConfigDict:
    """The configuration of a preset; `default_config` says what each setting means."""
    if preset not in PRESETS:
        raise ValueError(
            f'configs/gsm8k.py has no preset {preset!r}: no base policy is trained from scratch on '
            f'word problems; use {", ".join(PRESETS)}, or configs/countdown.py for a laptop'
        )
    config = default_config()  # the published recipe; only this is left open
    config.task.update(name='gsm8k', format='published_train')
    config.base.checkpoint = 'checkpoints/LLaDA-8B-Instruct'
    return config
