"""What the configurations in `configs/` share: presets for a laptop, for tests and for LLaDA-8B.

Each function changes a configuration that started as `spg_jax.config.default_config()`.
"""

from typing import NamedTuple

import ml_collections


class Hardware(NamedTuple):
    """How the published recipe is spread over a machine, which does not change what is learned."""

    topology: str  # the name of the machine for `spg_jax.plan`; '' is whatever machine there is
    mesh: tuple[int, int, int]  # devices along data, fsdp and tensor
    long_microbatch: int  # rows of Sudoku, of 1756 tokens, differentiated at once over all chips
    checkpoint: str = 'LLaDA-8B-Instruct'  # the published model, a folder of checkpoints/


# `python -m spg_jax.plan` says whether a preset fits its machine. A larger 'tensor' splits what a
# layer needs in memory, and a larger 'fsdp' what the parameters need. A few small chips need both.
HARDWARE = {
    'llada_8b': Hardware('', (1, -1, 1), 48),
    'llada_8b_v5e8': Hardware('v5e:2x4', (1, 4, 2), 24),
    'llada_8b_v5e16': Hardware('v5e:4x4', (1, 4, 4), 48),
    'llada_8b_v6e8': Hardware('v6e:2x4', (1, 4, 2), 48),
    'llada_8b_v5p4': Hardware('v5p:2x2x1', (1, 4, 1), 48),
    'llada_8b_h100': Hardware('h100:1', (1, 1, 1), 24),
    'llada_8b_a100x8': Hardware('a100:8', (1, 8, 1), 48),
    'llada2_mini_v5e16': Hardware('v5e:4x4', (1, 4, 4), 48, 'LLaDA2.0-mini'),
    'llada2_mini_v5p4': Hardware('v5p:2x2x1', (1, 4, 1), 48, 'LLaDA2.0-mini'),
    'dream_7b_v5e16': Hardware('v5e:4x4', (1, 4, 4), 48, 'Dream-v0-Instruct-7B'),
    'dream_7b_v5p4': Hardware('v5p:2x2x1', (1, 4, 1), 48, 'Dream-v0-Instruct-7B'),
}


def on_llada_8b(config: ml_collections.ConfigDict, preset: str = 'llada_8b') -> None:
    """Adds the model and a machine to the published recipe, which is the default configuration.

    Microbatches and passes over draws are our choice, and the gradient does not depend on them. The
    released code differentiates 6 rows (Sudoku 3) at once on each of 8 GPUs [S].

    Args:
      config: the configuration, which is changed. Its prompt length must be set before.
      preset: a key of HARDWARE.
    """
    hardware = HARDWARE[preset]
    config.task.format = 'published_train'
    config.base.checkpoint = f'checkpoints/{hardware.checkpoint}'  # SPG trains LLaDA-8B-Instruct
    config.model.remat = True
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = hardware.mesh
    config.rl.draws_per_pass = 1  # so that memory does not grow with M
    if config.sampling.prompt_length > 1000:
        config.rl.microbatch = hardware.long_microbatch


def on_a_laptop(config: ml_collections.ConfigDict, length: int, block_length: int) -> None:
    """Changes the published recipe into one for a small model on two CPU cores.

    The recipe has two draws and four inner updates, this one four draws and two inner updates,
    because the variance of the negative term harms small models most.

    Args:
      config: the configuration, which is changed.
      length: C, the number of completion tokens; each decoding step commits one.
      block_length: positions in a block; it divides `length`.
    """
    decoding = dict(length=length, steps=length, block_length=block_length)
    config.model.scan_unroll = config.model.layers  # faster on a CPU
    config.lora.update(rank=0, dropout=0.0)
    config.sampling.update(decoding, temperature=1.0)
    config.corruption.draws = 4
    config.rl.update(group_size=8, prompts=16, inner_updates=2, microbatch=128)
    config.optimizer.update(
        learning_rate=3e-4, warmup_fraction=0.02, weight_decay=0.0, grad_clip=1.0
    )
    config.train.steps = 120
    config.convert.update(
        phases=(
            *((1, 150, 1.0), (2, 100, 1.0), (block_length, 100, 1.0)),
            *((0, 400, 1.0), (block_length, 250, 0.3)),
        ),
        learning_rate=2e-3,
        weight_decay=0.01,
        noise_updates=50,
        validate_every=25,
    )
    config.evaluation.update(lengths=(length,), steps=(length,), block_length=block_length)
    config.evaluation.update(every=20, batch=256)
    config.checkpoint.every = 20


def tiny(config: ml_collections.ConfigDict) -> None:
    """Shrinks the configuration of a laptop to a run of seconds, for tests.

    It answers nothing right, yet some completions earn more than others, so that updates move.
    """
    config.model.update(width=32, layers=2, heads=2, kv_heads=2, mlp_width=64)
    config.model.scan_unroll = 1  # compiles one layer, not two
    # AdamW takes less time to compile than Muon, which pays in more steps than these.
    config.base.update(stages=((40, 1.0), (4, 0.35)), batch_size=32, muon_rate=0.0)
    # Blocks of 1, the whole length, and blocks of 4 as in `on_a_laptop`.
    config.convert.update(phases=((1, 2, 1.0), (0, 2, 1.0), (4, 4, 1.0)), batch_size=8)
    config.convert.update(noise_updates=2, validate_every=2, keep_best=2)
    # Whole batches, not slots, so that the program of evaluations also serves rollouts.
    config.rl.update(prompts=4, microbatch=16, compact=False)
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 8
    config.train.diagnose_every = 0  # its program would take a tenth of the run to compile
    # Batches of 32, as of rollouts, so that one compiled program serves both.
    config.evaluation.update(every=4, problems=16, batch=32, samples=2)
    config.checkpoint.every = 5  # between two updates on one rollout
