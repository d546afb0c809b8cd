"""Every setting of a run, its default and its meaning: a table and nothing else.

`configs/<task>.py` start from `default_config()` and change what their preset needs, with the help
of `spg_jax.presets`. `spg_jax.assembly` turns settings into the parts of a run, and refuses those
that cannot work. The defaults are the published recipe (SPG, arXiv 2510.09541, appendix and
released code) wherever the publication gives a number.
"""

import ml_collections
from ml_collections import config_dict

from spg_jax.models.lora import TARGETS


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
            rules='released',  # of reward and score: released | mended, see docs/scoring.md
            fields='',  # keys of given files, such as 'question:problem,answer:solution'; '' usual
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
