"""Every setting of a run, its default and its meaning, and what is derived from several of them.

`spg_jax.validation` refuses what cannot work. `configs/<task>.py` start from `default_config()` and change what their preset needs. The defaults are the published
recipe (SPG, arXiv 2510.09541, appendix and released code) wherever the publication gives a number.
"""

import hashlib
import json

import ml_collections
from ml_collections import config_dict

from spg_jax.diffusion import corruption, sampling


def default_config() -> ml_collections.ConfigDict:
    """The published recipe, without a task or a size of model."""
    c = config_dict.create

    return c(
        task=c(
            name='countdown',        # a name in spg_jax.tasks
            format='compact',        # compact | published_train; evaluation of the latter uses published_eval
            prompt_template='',      # file with the wording of the prompt; '' is our own
            data_dir='data',         # where the generated problems are kept
        ),
        model=c(                     # read when the base policy is trained here; an imported checkpoint brings its own
            width=96,
            layers=3,
            heads=4,
            kv_heads=4,
            mlp_width=256,
            tie_embeddings=True,     # unembed with the embedding table
            scale_logits=True,       # logits x width^-1/2; tied small models learn far faster so
            dtype='float32',         # of activations and products
            remat=False,             # recompute layers in the backward pass: less memory, a third more time
            scan_unroll=1,           # layers per iteration of the scan over layers
            attention='xla',
        ),
        base=c(
            checkpoint='',           # a policy directory or a published checkpoint to start from; '' trains one
            cache='runs/base',       # trained base policies, one folder for each hash of what made it
            stages=((3000, 1.0), (300, 0.35)),  # (steps, share of right demonstrations), one after the other
            batch_size=128,          # demonstrations a step
            learning_rate=3e-3,      # peak; warm-up, then cosine to a twentieth
            weight_decay=0.01,
            grad_clip=1.0,
            ema=0.995,               # decay of the averaged parameters, which are the base policy
            seed=0,
        ),
        sampling=c(
            prompt_length=200,       # prompts are left-padded to this many tokens
            length=256,              # completion tokens
            steps=128,               # denoising steps for the whole completion
            block_length=32,
            temperature=0.9,
            commit='low_confidence',  # which positions a step fixes: low_confidence | random | entropy | margin
            guidance=0.0,            # classifier-free guidance scale
            stop_early=True,         # stop once every row has ended; False decodes the rest as released
        ),
        corruption=c(
            kind='block',            # full | uniform | block | block_full
            draws=2,                 # Monte-Carlo draws a sequence, M
            prompt_rate=0.15,        # perturbation of prompt and, under block, earlier blocks
            block_draw='balanced',   # balanced | released
        ),
        rl=c(
            objective='spg',         # a name in spg_jax.rl.objectives.REGISTRY
            negative='mixture',      # of a completion worse than its group: mixture | eubo | elbo | none
            estimator='released',    # released | paper (uniform corruption) | block (block corruption)
            bound='plain',           # plain | strict | loose: which upper bound
            beta=1.5,                # Renyi order of the EUBO
            omega=0.5,               # share of the EUBO in the mixture
            group_size=6,            # completions a prompt, G
            prompts=16,              # prompts a rollout batch
            inner_updates=4,         # gradient steps a rollout batch
            microbatch=6,            # rows differentiated at once; divides prompts x group_size
            draws_per_pass=0,        # draws differentiated at once; 0 is all, 1 keeps memory flat in M
        ),
        optimizer=c(
            learning_rate=3e-6,      # constant after the warm-up
            warmup_fraction=1e-4,    # of the steps
            b1=0.9,
            b2=0.99,
            weight_decay=0.1,
            grad_clip=0.2,
        ),
        mesh=c(data=-1, fsdp=1, tensor=1),  # devices along each axis; -1 is all that are left
        train=c(
            steps=6000,              # updates
            seed=0,
            max_skipped=20,          # non-finite updates in a row before the run stops
        ),
        evaluation=c(
            lengths=(128, 256, 512),  # completion lengths, each reported
            steps=(64, 128, 256),    # denoising steps for each length
            block_length=32,
            every=100,               # updates between validations
            problems=256,            # validation problems
            batch=64,                # rows generated at once
            samples=8,               # k of pass@k
        ),
        checkpoint=c(
            every=100,               # updates between checkpoints
            keep=2,
        ),
    )


def sampling_config(config: ml_collections.ConfigDict) -> sampling.SamplingConfig:
    """How rollouts are decoded."""
    fields = {k: v for k, v in config.sampling.items() if k != 'prompt_length'}
    return sampling.SamplingConfig(**fields)


def evaluation_lengths(config: ml_collections.ConfigDict) -> list[tuple[int, int]]:
    """(length, steps) of each evaluation."""
    lengths, steps = config.evaluation.lengths, config.evaluation.steps
    if len(lengths) != len(steps) or not lengths:
        raise ValueError(
            f'evaluation.lengths {tuple(lengths)} and evaluation.steps {tuple(steps)} must pair up; '
            'give one number of steps for each length'
        )
    return list(zip(lengths, steps, strict=True))


def evaluation_sampling(
    config: ml_collections.ConfigDict, length: int, steps: int, temperature: float = 0.0
) -> sampling.SamplingConfig:
    """How problems are decoded when accuracy is measured: low confidence, greedy unless told otherwise."""
    return sampling.SamplingConfig(
        length=length,
        steps=steps,
        block_length=config.evaluation.block_length,
        temperature=temperature,
        guidance=config.sampling.guidance,
        stop_early=config.sampling.stop_early,
    )


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
