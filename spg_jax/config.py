"""Every setting of a run, its default and its meaning, and what is derived from several of them.

`spg_jax.validation` refuses what cannot work. `configs/<task>.py` start from `default_config()`
and change what their preset needs. The defaults are the published recipe (SPG, arXiv 2510.09541,
appendix and released code) wherever the publication gives a number.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from spg_jax import tasks
from spg_jax.diffusion import corruption, sampling
from spg_jax.models.attention import resolve
from spg_jax.models.lora import TARGETS, LoRA
from spg_jax.models.transformer import EXECUTION, TransformerConfig


def default_config() -> ml_collections.ConfigDict:
    """The published recipe, without a task or a size of model.

    The comment on a published number ends in its source: the appendix of the paper [A]; in the
    released code the scripts of spg/slurm_scripts/spg_mix, for 8 GPUs [S], spg/diffu_grpo_config.py
    [C] and eval/ [E]. Other numbers are ours.
    """
    c = config_dict.create

    return c(
        task=c(
            name='countdown',  # a name in spg_jax.tasks
            format='compact',  # compact | published_train (evaluated as published_eval)
            prompt_template='',  # file with the wording of the prompt; '' is our own
            shots=0,  # worked examples in the prompt; published Sudoku has up to 3, others none
            rules='released',  # of the reward: released | mended (math500, see its task.py)
            data_dir='data',  # where problems are kept, and given files of them looked for
        ),
        data=c(
            # What to do with training prompts over sampling.prompt_length: 'drop' leaves them out.
            # Evaluation takes prompts whole, however long; base policies refuse long ones always.
            long_prompts='drop',  # drop | truncate_left (keep the end, as released) | error
        ),
        model=c(  # of a base policy trained here; an imported checkpoint brings its own
            width=64,  # D
            layers=6,  # transformer blocks; these tasks reward depth over width
            heads=4,  # N
            kv_heads=4,  # K; fewer than heads is grouped-query attention
            mlp_width=192,  # F
            tie_embeddings=True,  # unembed with the embedding table
            scale_logits=True,  # logits x width^-1/2; tied small models learn far faster so
            dtype='float32',  # of activations and products
            remat=False,  # recompute layers backwards: less memory, a third more time
            scan_unroll=1,  # layers per iteration of the scan over layers
            attention='auto',  # auto (the platform's fastest) | einsum | folded | splash | cudnn
            quantize='',  # kernels of the frozen base under adapters: int8 | int4 | nf4; '' as read
        ),
        base=c(
            checkpoint='',  # a policy directory or published checkpoint; '' trains a policy
            cache='runs/base',  # trained base policies, a folder for each hash of what made it
            stages=((1500, 1.0), (300, 0.3)),  # (steps, share of right demonstrations), in turn
            batch_size=128,  # demonstrations a step
            learning_rate=3e-3,  # peak; warm-up, then cosine to a tenth
            weight_decay=0.01,  # of everything but norms
            grad_clip=1.0,  # largest gradient norm
            ema=0.995,  # decay of the averaged parameters, which are the base policy
            number_features=False,  # start embeddings of numbers as waves of their value
            seed=0,  # of parameters, data order and masks
        ),
        lora=c(  # adapters, in RL
            rank=128,  # with them nothing else is trained; 0 trains every parameter [A]
            alpha=64.0,  # an adapter's product is scaled by alpha / rank [A]
            dropout=0.05,  # share of an adapter's inputs dropped in updates [A]
            targets=TARGETS,  # products that have one [A]
            adapter='',  # what PEFT saved, to start from; '' starts from new ones
        ),
        sampling=c(
            prompt_length=200,  # P; training prompts are left-padded to it [A]
            prompt_buckets=(),  # or to the shortest of these with room for the batch's longest
            length=256,  # C, completion tokens [A]
            steps=128,  # denoising steps for the whole completion [A]
            block_length=32,  # positions finished before the next ones start [A]
            temperature=0.9,  # of the Gumbel-max choice of tokens [C]
            commit='low_confidence',  # which to fix: low_confidence | random | entropy | margin [C]
            guidance=0.0,  # classifier-free guidance scale [C]
            stop_early=True,  # stop once every row has ended; False decodes the rest as released
        ),
        corruption=c(
            kind='block',  # full | uniform | block | block_full [S]
            draws=2,  # M, Monte-Carlo draws a sequence [S]
            prompt_rate=0.15,  # perturbation of the prompt and, under block, of earlier blocks [A]
            block_draw='balanced',  # balanced | released
        ),
        rl=c(
            objective='spg',  # a name in spg_jax.rl.objectives.REGISTRY
            negative='mixture',  # for worse completions: mixture | eubo | elbo | none [S]
            estimator='released',  # released | paper (uniform) | block (block corruption)
            bound='plain',  # plain | strict | loose: which upper bound
            beta=1.5,  # Renyi order of the EUBO [S]
            omega=0.5,  # share of the EUBO in the mixture [S]
            group_size=6,  # G, completions a prompt [S]
            prompts=16,  # prompts a rollout batch [S]
            generation_batch=0,  # completions generated at once, while others are scored; 0 is all
            inner_updates=4,  # gradient steps a rollout batch [S]
            microbatch=48,  # rows differentiated at once, over all devices: 6 on each of 8
            draws_per_pass=0,  # draws differentiated at once; 0 is all, 1 keeps memory flat in M
        ),
        optimizer=c(
            learning_rate=3e-6,  # constant after the warm-up [A]
            warmup_fraction=1e-4,  # of the steps [A]
            b1=0.9,  # AdamW's decay of the mean gradient [A]
            b2=0.99,  # AdamW's decay of the mean square [A]
            weight_decay=0.1,  # of everything but norms [A]
            grad_clip=0.2,  # largest gradient norm [A]
        ),
        mesh=c(
            data=-1,  # devices along rows; -1 is all that are left
            fsdp=1,  # devices along rows that also split the parameters
            tensor=1,  # devices along heads, MLP and vocabulary
        ),
        train=c(
            steps=6000,  # updates [E]
            seed=0,  # of prompts, sampling and corruption
            max_skipped=20,  # non-finite updates in a row before the run stops
            wandb='',  # project to log to as well (extra 'wandb'); '' does not
        ),
        evaluation=c(
            lengths=(128, 256, 512),  # completion lengths, each reported [E]
            steps=(64, 128, 256),  # denoising steps for each length [E]
            block_length=32,  # positions finished before the next ones start [E]
            every=100,  # updates between validations
            problems=256,  # validation problems
            batch=64,  # rows generated at once
            samples=8,  # k of pass@k
        ),
        checkpoint=c(
            every=100,  # updates between checkpoints
            keep=2,  # newest checkpoints kept
        ),
    )


class Hardware(NamedTuple):
    """How the published recipe is spread over a machine. None of it changes what is learned."""

    topology: str  # as `spg_jax.plan` names it; '' is whatever there is
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    long_microbatch: int  # rows of Sudoku, 1756 tokens, differentiated at once over all chips


# `python -m spg_jax.plan` says whether one fits. More 'tensor' splits what a layer needs,
# more 'fsdp' what stays; small meshes of small chips need some of both.
HARDWARE = {
    'llada_8b': Hardware('', (1, -1, 1), 48),
    'llada_8b_v5e8': Hardware('v5e:2x4', (1, 4, 2), 24),
    'llada_8b_v5e16': Hardware('v5e:4x4', (1, 4, 4), 48),
    'llada_8b_v6e8': Hardware('v6e:2x4', (1, 4, 2), 48),
    'llada_8b_v5p4': Hardware('v5p:2x2x1', (1, 4, 1), 48),
    'llada_8b_h100': Hardware('h100:1', (1, 1, 1), 24),
    'llada_8b_a100x8': Hardware('a100:8', (1, 8, 1), 48),
}


def on_llada_8b(config: ml_collections.ConfigDict, preset: str = 'llada_8b') -> None:
    """Completes the published recipe, which the defaults are, with the model and a machine.

    Microbatches and passes over draws are ours: the gradient does not depend on them. The released
    code differentiates 6 rows (Sudoku 3) on each of 8 GPUs at once [S].

    Args:
      config: changed in place; after the length of its prompts is set.
      preset: a name in HARDWARE.
    """
    hardware = HARDWARE[preset]
    config.task.format = 'published_train'
    config.base.checkpoint = 'checkpoints/LLaDA-8B-Instruct'  # the model SPG trains
    config.model.remat = True
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = hardware.mesh
    config.rl.draws_per_pass = 1  # memory flat in M
    if config.sampling.prompt_length > 1000:
        config.rl.microbatch = hardware.long_microbatch


def on_a_laptop(config: ml_collections.ConfigDict, length: int, block_length: int) -> None:
    """Changes the published recipe into one for a small model on two CPU cores.

    Four draws and two inner updates in place of two and four: at this size the variance of the
    negative term is what hurts.

    Args:
      config: changed in place.
      length: completion tokens, decoded one a step.
      block_length: divides `length`.
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
    config.evaluation.update(lengths=(length,), steps=(length,), block_length=block_length)
    config.evaluation.update(every=20, batch=256)
    config.checkpoint.every = 20


def tiny(config: ml_collections.ConfigDict) -> None:
    """Changes a laptop's configuration into one of seconds, for tests: it learns nothing."""
    config.model.update(width=32, layers=2, heads=2, kv_heads=2, mlp_width=64)
    config.base.update(stages=((20, 1.0), (4, 0.35)), batch_size=32)
    config.rl.update(prompts=4, microbatch=16)
    config.train.steps = 8
    config.evaluation.update(every=4, problems=16, batch=64)
    config.checkpoint.every = 4


def training_task(config: ml_collections.ConfigDict) -> tasks.Task:
    """The task as rollouts and demonstrations see it."""
    return _task(config, config.task.format)


def evaluation_task(config: ml_collections.ConfigDict) -> tasks.Task:
    """The task as evaluation sees it: the published formats differ between the two."""
    trained = config.task.format
    return _task(config, 'published_eval' if trained == 'published_train' else trained)


def _task(config: ml_collections.ConfigDict, format: str) -> tasks.Task:
    return tasks.get(
        config.task.name,
        format,
        config.task.prompt_template,
        config.task.shots,
        config.task.rules,
    )


def sampling_config(config: ml_collections.ConfigDict) -> sampling.SamplingConfig:
    """How rollouts are decoded."""
    fields = {k: v for k, v in config.sampling.items() if not k.startswith('prompt_')}
    return sampling.SamplingConfig(**fields)


def prompt_buckets(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """The lengths that prompts are padded to, ascending."""
    return (*config.sampling.prompt_buckets, config.sampling.prompt_length)


def generation_batch(config: ml_collections.ConfigDict) -> int:
    """Completions that a rollout generates at once, over all devices."""
    return config.rl.generation_batch or config.rl.prompts * config.rl.group_size


def lora_of(config: ml_collections.ConfigDict) -> LoRA | None:
    """The adapters that RL trains; None if it trains every parameter."""
    sizes = {name: value for name, value in config.lora.items() if name != 'adapter'}
    return LoRA(**sizes) if config.lora.rank else None


def adapter_of(config: ml_collections.ConfigDict) -> Path | None:
    """The saved adapters that RL starts from, if any."""
    return Path(config.lora.adapter) if config.lora.adapter else None


def execution_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """How a policy's model computes, which does not belong to its parameters."""
    return {name: config.model[name] for name in EXECUTION}


def model_of(
    config: ml_collections.ConfigDict, vocab_size: int, platform: str
) -> TransformerConfig:
    """The model of a base policy trained here, on devices of a platform; raises as its parts do."""
    chosen = resolve(config.model.attention, platform, config.model.dtype)
    return TransformerConfig(vocab_size, **config.model.to_dict() | {'attention': chosen})


def evaluation_lengths(config: ml_collections.ConfigDict) -> list[tuple[int, int]]:
    """(length, steps) of each evaluation."""
    lengths, steps = config.evaluation.lengths, config.evaluation.steps
    if len(lengths) != len(steps) or not lengths:
        raise ValueError(
            f'evaluation.lengths {tuple(lengths)} and evaluation.steps {tuple(steps)} must pair '
            'up; give one number of steps for each length'
        )
    return list(zip(lengths, steps, strict=True))


def evaluation_sampling(
    config: ml_collections.ConfigDict, length: int, steps: int, temperature: float = 0.0
) -> sampling.SamplingConfig:
    """How problems are decoded when accuracy is measured: low confidence, greedy unless told
    otherwise."""
    try:
        return sampling.SamplingConfig(
            length=length,
            steps=steps,
            block_length=config.evaluation.block_length,
            temperature=temperature,
            guidance=config.sampling.guidance,
            stop_early=config.sampling.stop_early,
        )
    except ValueError as error:
        raise ValueError(str(error).replace('sampling.', 'evaluation.')) from None


def corruption_of(config: ml_collections.ConfigDict) -> corruption.Corruption:
    """The corruption of the RL objective; under the block estimator earlier blocks stay clean."""
    return corruption.Corruption(
        kind=config.corruption.kind,
        draws=config.corruption.draws,
        block_length=config.sampling.block_length,
        prompt_rate=config.corruption.prompt_rate,
        block_draw=config.corruption.block_draw,
        perturb_completion=config.rl.estimator != 'block',
    )


def digest(settings: ml_collections.ConfigDict | dict) -> str:
    """Ten hexadecimal digits that name these settings; equal settings, equal name."""
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
