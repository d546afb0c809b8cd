"""SPG on 4x4 Sudoku: the reward is the share of the empty cells that are filled correctly.

python -m spg_jax.train --config=configs/sudoku.py            # small: a laptop
python -m spg_jax.train --config=configs/sudoku.py:tiny       # the whole pipeline, no learning
python -m spg_jax.train --config=configs/sudoku.py:llada_8b   # published recipe on LLaDA-8B
python -m spg_jax.plan --config=configs/sudoku.py:llada_8b_v5e16 --topology=v5e:4x4

With seed 0, right cells rise from 67 % to 96 % and right grids from 18 % to 90 %
(docs/base_policy.md, docs/board.md).
"""

import ml_collections

from spg_jax.config import default_config
from spg_jax.presets import HARDWARE, on_a_laptop, on_llada_8b, tiny

PRESETS = ('small', 'tiny', *HARDWARE)


def get_config(preset: str = 'small') -> ml_collections.ConfigDict:
    """The configuration of a preset; `default_config` says what each setting means."""
    config = default_config()
    config.task.name = 'sudoku'
    if preset in HARDWARE:
        # Numbers that are published for Sudoku only; `default_config` explains their sources.
        config.task.shots = 3  # [S]
        config.sampling.prompt_length = 1500  # [S]
        config.sampling.temperature = 0.3  # [S]
        config.spg.beta = 1.0  # [S]
        config.train.steps = 2500  # [E]
        on_llada_8b(config, preset)
        return config
    if preset not in PRESETS:
        raise ValueError(
            f'configs/sudoku.py has no preset {preset!r}; use one of {", ".join(PRESETS)}'
        )

    # A prompt is 16 digits and a colon. An answer is a tag, 16 digits, a tag and EOS: 19 tokens.
    on_a_laptop(config, length=20, block_length=4)
    config.sampling.prompt_length = 17
    config.base.update(stages=((1000, 1.0), (250, 0.15)), muon_rate=0.01, batch_size=64)
    config.spg.beta = 1.0
    if preset == 'tiny':
        tiny(config)
    return config
