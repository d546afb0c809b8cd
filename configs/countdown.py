"""SPG on Countdown with three numbers: reach the target with +, -, * and /, every number once.

python -m spg_jax.train --config=configs/countdown.py             # small: a laptop
python -m spg_jax.train --config=configs/countdown.py:tiny        # seconds: the whole pipeline, learning nothing
python -m spg_jax.train --config=configs/countdown.py:llada_8b    # the published recipe
"""

import ml_collections

from spg_jax.config import default_config

PRESETS = ('small', 'tiny', 'llada_8b')


def get_config(preset: str = 'small') -> ml_collections.ConfigDict:
    """The configuration of a preset; `default_config` says what each setting means."""
    config = default_config()
    config.task.name = 'countdown'
    if preset == 'llada_8b':
        return _published(config)
    if preset not in PRESETS:
        raise ValueError(f'configs/countdown.py has no preset {preset!r}; use one of {", ".join(PRESETS)}')

    # A prompt is "30 100 93 = 23 :", an answer "<answer> 30 + 93 - 100 </answer>" and EOS: one token a step,
    # because the tokens of an expression depend on each other.
    config.sampling.update(prompt_length=6, length=12, steps=12, block_length=4, temperature=1.0)
    config.base.update(stages=((2500, 1.0), (250, 0.35)))
    config.corruption.draws = 4
    config.rl.update(group_size=8, prompts=16, inner_updates=2, microbatch=128, beta=1.5, omega=0.5)
    config.optimizer.update(learning_rate=3e-4, warmup_fraction=0.02, weight_decay=0.0, grad_clip=1.0)
    config.train.steps = 200
    config.evaluation.update(lengths=(12,), steps=(12,), block_length=4, every=20, batch=256)
    config.checkpoint.every = 20
    if preset == 'tiny':
        config.model.update(width=32, layers=2, heads=2, kv_heads=2, mlp_width=64)
        config.base.update(stages=((20, 1.0), (4, 0.35)), batch_size=32)
        config.rl.update(prompts=4, microbatch=16)
        config.train.steps = 8
        config.evaluation.update(every=4, problems=16, batch=64, samples=2)
        config.checkpoint.every = 4
    return config


def _published(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """What the defaults leave open for Countdown (SPG, appendix: pure EUBO with beta 2 is its best there)."""
    config.task.format = 'published_train'
    return config
