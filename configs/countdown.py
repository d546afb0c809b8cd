"""SPG on Countdown with three numbers: reach the target with +, -, * and /, each number used once.

python -m spg_jax.train --config=configs/countdown.py            # small: a laptop
python -m spg_jax.train --config=configs/countdown.py:tiny       # the whole pipeline, no learning
python -m spg_jax.train --config=configs/countdown.py:worked     # small, and the steps are written
python -m spg_jax.train --config=configs/countdown.py:llada_8b   # published recipe on LLaDA-8B
python -m spg_jax.plan --config=configs/countdown.py:llada_8b_v5e16 --topology=v5e:4x4

The base policy takes half of the time; right answers rise from 9 % to 80 % with seed 0, and from
13 % to 74 % with seed 1 (docs/base_policy.md). The base policy of `worked` takes six CPU minutes
and answers 8 % right.
"""

import ml_collections

from spg_jax.config import default_config
from spg_jax.presets import HARDWARE, on_a_laptop, on_llada_8b, tiny

PRESETS = ('small', 'tiny', 'worked', *HARDWARE)


def get_config(preset: str = 'small') -> ml_collections.ConfigDict:
    """The configuration of a preset; `default_config` says what each setting means."""
    config = default_config()
    config.task.name = 'countdown'
    if preset in HARDWARE:
        on_llada_8b(config, preset)
        return config
    if preset not in PRESETS:
        raise ValueError(
            f'configs/countdown.py has no preset {preset!r}; use one of {", ".join(PRESETS)}'
        )

    # A prompt is "100 93 30 = 23 :" and an answer "<answer> 93 + 30 - 100 </answer>" with EOS. Each
    # decoding step commits one token, because the tokens of an expression depend on each other.
    on_a_laptop(config, length=12, block_length=4)
    config.sampling.prompt_length = 6
    config.base.update(stages=((1300, 1.0), (300, 0.15)), number_features=True)
    config.base.update(muon_rate=0.01, batch_size=64)
    if preset == 'worked':
        # "93 + 30 = 123 ; 123 - 100 = 23 ;" comes before the answer: about 20 tokens, which depend
        # on each other over a distance, so that a faster sampler has more to save and to lose.
        config.task.format = 'worked'
        on_a_laptop(config, length=64, block_length=16)
        config.base.update(stages=((700, 1.0), (120, 0.3)), muon_rate=0.0)
    if preset == 'tiny':
        tiny(config)
    return config
