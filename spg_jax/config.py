"""Every setting of a run, with its default and its meaning.

The files `configs/<task>.py` start from `default_config()` and change the settings of their preset,
with the help of `spg_jax.presets`. `spg_jax.assembly` makes the parts of a run from the settings,
and refuses settings that cannot work. Where the publication gives a number, it is the default (SPG,
arXiv 2510.09541, appendix and released code).
"""

import ml_collections
from ml_collections import config_dict

from spg_jax.method import set_objective
from spg_jax.models.lora import TARGETS
from spg_jax.training.phases import PHASES


def default_config(objective: str = 'spg') -> ml_collections.ConfigDict:
    """The published recipe, without a task and without the size of a model.

    The comment on a published number ends in its source: the appendix of the paper [A], or in the
    released code the scripts of spg/slurm_scripts/spg_mix, for 8 GPUs [S],
    spg/diffu_grpo_config.py [C] or eval/ [E]. Numbers without a source are our choice. Capital
    letters such as P and C are the axis letters that comments in the code use. The configuration is
    locked: a name that is not here cannot be set.

    Args:
      objective: a file of spg_jax/rl/objectives, or the dotted path of a user's own file. Its own
        settings become the group with its name, such as `config.spg`.

    Raises:
      ValueError: if there is no such objective.
    """
    c = config_dict.create

    config = c(
        task=c(
            # The dotted path of a module, such as my_package.my_task, names a task of your own.
            name='countdown',  # the task: countdown, gsm8k, math500, sudoku or a dotted path
            # A run that trains on 'published_train' is evaluated on 'published_eval'. In 'worked',
            # which Countdown has as well, the steps stand before the answer.
            format='compact',  # the format of prompts and answers: compact or published_train
            prompt_template='',  # a file with the wording of the prompt; '' uses our wording
            shots=0,  # worked examples in each prompt: 0 to 3 in published Sudoku, 0 elsewhere
            rules='released',  # rules of reward and score: released or mended (docs/scoring.md)
            # For example 'question:problem,answer:solution', where a file calls a question problem.
            fields='',  # the keys that files of problems use; '' expects the usual ones
            data_dir='data',  # the folder of the problems, also searched for published files
        ),
        data=c(
            # A training prompt is long if it has more than sampling.prompt_length tokens. 'drop'
            # leaves out its problem, 'truncate_left' keeps the end of the prompt as the released
            # code does, and 'error' ends the run. Evaluation never drops or cuts a prompt. The
            # training of a base policy always refuses long prompts.
            long_prompts='drop',  # what happens to long prompts: drop, truncate_left or error
        ),
        # A policy trained here has these sizes. A checkpoint brings its own sizes and dtype.
        model=c(
            width=64,  # D, the width of the hidden states
            layers=6,  # the number of transformer blocks; these tasks need depth more than width
            heads=4,  # N, the number of attention heads
            kv_heads=4,  # K, the number of key/value heads, which groups of attention heads share
            mlp_width=192,  # F, the width inside the gated MLP
            tie_embeddings=True,  # whether the embedding table is also the output layer
            # Small models with tied embeddings learn far faster with scaled logits.
            scale_logits=True,  # whether logits are multiplied by width**-0.5
            dtype='float32',  # the type of activations and products: float32 or bfloat16
            # The last four settings say how to compute, and apply to checkpoints as well.
            # Recomputation saves memory and takes about a third more time.
            remat=False,  # whether the backward pass recomputes each layer instead of storing it
            scan_unroll=1,  # layers in one iteration of the loop over layers; more suits CPUs
            # 'auto' is the fastest implementation on the platform.
            attention='auto',  # the implementation: auto, einsum, folded, splash or cudnn
            quantize='',  # format of the kernels under adapters: int8, int4 or nf4; '' keeps them
        ),
        base=c(  # the base policy, from which RL starts
            checkpoint='',  # a policy directory or published checkpoint; '' trains a base policy
            # Reinforcement learning needs diffusion; spg_jax.convert makes it of the other kind.
            kind='diffusion',  # what a base policy trained here is: diffusion or autoregressive
            cache='runs/base',  # the folder that holds the base policies which are trained here
            # The share of right answers in a stage lies in [0, 1].
            stages=((1500, 1.0), (300, 0.3)),  # (steps, share of right answers) of each stage
            batch_size=128,  # demonstrations in the batch of one training step
            learning_rate=3e-3,  # the peak of the learning rate, from which it falls to a tenth
            # Kernels of small models learn in fewer steps by Muon; the rest keeps AdamW.
            muon_rate=0.0,  # the peak of Muon's learning rate for kernels of layers; 0: no Muon
            weight_decay=0.01,  # weight decay of all parameters except the scales of norms
            grad_clip=1.0,  # a gradient with a larger norm is scaled down to this norm
            ema=0.995,  # decay per step of the averaged parameters, which become the base policy
            number_features=False,  # whether embeddings of numbers start as waves of their value
            # A second loss, for samplers that edit: a right answer is to be read out of a wrong
            # one, which has no mask, at all positions (docs/sampling.md). Tokens between masks may
            # be predicted as well, so that samplers which edit there know what to keep.
            keep_weight=0.0,  # the weight of the loss on tokens that are not masked; 0: none
            edit_weight=0.0,  # the weight of the loss on wrong answers; 0 leaves it out
            wrong_share=0.5,  # the share of them that are the task's wrong answers, others right
            random_rate=0.2,  # the largest share of their tokens that random ones replace
            seed=0,  # the seed of initial parameters, order of demonstrations, and masks
        ),
        # How spg_jax.convert makes a diffusion model of an autoregressive one. The sizes of blocks
        # rise and fall as in LLaDA2.0, which publishes neither updates nor learning rate.
        convert=c(
            # A block of 0 is the whole length. The model sees blocks of the last size afterwards.
            phases=PHASES,  # (block, updates, share of the learning rate) of each phase
            documents=1,  # examples in one sequence, which do not see each other
            length=0,  # tokens of a sequence; 0 is the shortest that fits examples and blocks
            batch_size=64,  # sequences in the batch of one update, without their complements
            learning_rate=2e-5,  # the learning rate, constant but for a rise and the shares above
            weight_decay=0.1,  # weight decay of all parameters except the scales of norms
            grad_clip=1.0,  # a gradient with a larger norm is scaled down to this norm
            right_share=1.0,  # the share of right answers among the demonstrations
            complementary=True,  # whether each sequence also comes with the other tokens masked
            # The size that LLaDA2.0 used is not published.
            noise=0.5,  # noise on embeddings of MASK, as a share of the size of embeddings
            noise_updates=200,  # the updates at the start that have this noise
            # 2.0 is recommended: fewer steps of decoding for some accuracy.
            cap=0.0,  # weight of the entropy of predictions that are right; 0 leaves it out
            validate_every=100,  # updates between two measurements of the loss on validation
            keep_best=3,  # k: the result is the mean of the k best policies of the last phase
        ),
        lora=c(  # low-rank adapters, which are trained in place of the parameters of a checkpoint
            rank=128,  # the rank of the adapters; 0 trains every parameter without adapters [A]
            alpha=64.0,  # the product of an adapter is multiplied by alpha / rank [A]
            dropout=0.05,  # the share of an adapter's inputs that updates drop [A]
            targets=TARGETS,  # the products that have an adapter, names of models.lora.TARGETS [A]
            adapter='',  # a directory of adapters that PEFT saved, to start from; '' makes new ones
        ),
        sampling=c(  # how completions are generated in training
            prompt_length=200,  # P, the number of tokens that prompts are left-padded to [A]
            # A batch is padded to the shortest of these lengths, or else to prompt_length.
            prompt_buckets=(),  # shorter lengths for batches of short prompts, ascending
            length=256,  # C, the number of tokens in a completion [A]
            steps=128,  # denoising steps over the whole completion; each commits some tokens [A]
            block_length=32,  # positions in a block, which is finished before the next starts [A]
            temperature=0.9,  # temperature of the choice of tokens; 0 takes the likeliest [C]
            # 'low_confidence' is the published name for keeping the most probable tokens; the other
            # rules are random, entropy, margin and left_to_right, and those of sampling.sampler.
            commit='low_confidence',  # the rule by which a step keeps some tokens [C]
            # threshold, llada2, factor and entropy_bounded may keep more tokens a step and end a
            # block sooner; remask also takes tokens back; llada21 edits as it goes, and autoedit
            # what sampling.commit has drafted (docs/sampling.md).
            sampler='',  # the rule by its name or your own by dotted path; '' is sampling.commit
            # LLaDA2 keeps all tokens above 0.95.
            threshold=0.9,  # the probability from which threshold, llada2(1) and remask are sure
            factor=1.0,  # f of factor: the n surest are kept while (n + 1)(1 - confidence) < f
            entropy_bound=0.1,  # the sum of entropies, in nats, up to which entropy_bounded keeps
            remasks=4,  # how many tokens of a block remask may take back
            edit_threshold=0.9,  # the probability above which a token replaces one that is there
            post_steps=16,  # rounds of a block that llada21 may take after its last mask has gone
            edit_rounds=3,  # K, rounds in which autoedit writes a finished completion anew
            keep_threshold=0.5,  # the probability below which autoedit writes a token anew
            # A cache is approximate: keys and values outside of the window are old.
            cache='',  # what a step computes: '' all, dual its block, prefix its block and the rest
            refresh=32,  # steps of a block between two passes that compute everything
            # 'fast' sets what FAST in spg_jax/method.py holds. Settings of the command line stay.
            preset='',  # settings of a faster rollout: '' sets none, or fast
            top_k=0,  # tokens are drawn among this many likeliest ids; 0 takes all
            top_p=1.0,  # the share of probability, in likeliest ids, that tokens are drawn from
            guidance=0.0,  # scale of classifier-free guidance; 0 switches it off [C]
            # 'timesteps' is Dream's: the share of masked tokens that a noise schedule removes.
            schedule='even',  # how many tokens each step of a block keeps: even or timesteps
            # The released code does not stop early and decodes all blocks.
            stop_early=True,  # whether a completion ends with the block that holds its first EOS
        ),
        corruption=c(  # how completions are masked for the likelihood bounds
            kind='block',  # what is masked: full, uniform, block or block_full [S]
            draws=2,  # M, the number of random maskings of each completion in an update [S]
            # The block kinds also mask tokens of earlier blocks with this probability, unless
            # spg.estimator is 'block'.
            prompt_rate=0.15,  # probability that a token of the prompt is masked [A]
            # The released choice is neither uniform nor free of repeats.
            block_draw='balanced',  # how draws choose blocks: balanced or released
            # 'stratified' spreads the numbers of a row evenly over what they can be.
            times='independent',  # numbers of masked tokens in draws: independent or stratified
            # Informed masking (arXiv 2609.25927) keeps the number of masked positions, and prefers
            # tokens that constrain others little.
            informed=False,  # whether influence decides which positions are masked
            strength=1.5,  # d, how strongly positions of little influence are preferred
            window=10,  # w, the distance in tokens up to which influence is measured
            # The two draws of a pair mask each position once: of a uniform draw, or of its block.
            complementary=False,  # whether draws come in pairs of a mask and its complement
        ),
        rl=c(
            # Its own settings are the group with its name, such as spg (spg_jax/method.py).
            objective='spg',  # the method: a file of spg_jax/rl/objectives, or a dotted path
            # 'published' sets what RECIPE in the file of the objective holds. Settings of the
            # command line stay as they are.
            recipe='ours',  # values that the publication gives: ours (the preset's) or published
            group_size=6,  # G, the number of completions of each prompt [S]
            prompts=16,  # the number of prompts in a rollout batch [S]
            # While one part is generated, the part before it is decoded and rewarded.
            generation_batch=0,  # completions that are generated at once; 0 generates all
            # Needs one shard of rows (mesh.data x mesh.fsdp); others generate whole batches.
            compact=True,  # whether rows leave the batch that have ended, or wait for their block
            inner_updates=4,  # updates on each rollout batch [S]
            # The released code differentiates 6 rows at once on each of 8 GPUs.
            microbatch=48,  # rows that are differentiated at once, on all devices together
            # With 1 memory does not grow with corruption.draws.
            draws_per_pass=0,  # draws of a row that are differentiated at once; 0 takes all
            # The rest are plug-ins, for every method that admits them (spg_jax/rl/plug_ins.py).
            # Others than the method's own are centred, leave_one_out, standardised and raw.
            advantage='method',  # what becomes of the rewards of a group: method or another
            kl=0.0,  # weight of the divergence from the initial policy; 0 leaves it out
            kl_estimator='k3',  # how that divergence is estimated: k2 or k3
            # 'ppo' stops a gradient that leads out of the range, 'unconditional' any outside it.
            clip='method',  # how ratios to the sampling policy are clipped, such as ppo
            clip_range=0.2,  # half-width of the range, for methods without a range of their own
        ),
        optimizer=c(  # AdamW, for RL
            learning_rate=3e-6,  # the learning rate at the end of the warm-up [A]
            warmup_fraction=1e-4,  # the share of train.steps in which the learning rate rises [A]
            b1=0.9,  # decay of the running mean of gradients [A]
            b2=0.99,  # decay of the running mean of squared gradients [A]
            weight_decay=0.1,  # weight decay of all parameters except the scales of norms [A]
            grad_clip=0.2,  # a gradient with a larger norm is scaled down to this norm [A]
            schedule='constant',  # after the warm-up: constant, linear or cosine, to final_share
            final_share=0.0,  # where linear and cosine end, as a share of the learning rate
        ),
        mesh=c(  # how the devices are arranged; an axis of -1 takes all devices that are left
            data=-1,  # the number of devices along which rows are split and parameters repeated
            fsdp=1,  # the number of devices along which both rows and parameters are split
            tensor=1,  # the number of devices along which heads, MLP and vocabulary are split
        ),
        train=c(
            steps=6000,  # the number of updates of the run [E]
            seed=0,  # the seed of order of prompts, sampling and corruption
            # A non-finite update leaves the parameters as they are.
            max_skipped=20,  # the run stops after this many non-finite updates in a row
            # Entropy, and divergences from before and from the base policy, cost a forward pass.
            diagnose_every=20,  # updates between two diagnoses of the policy; 0 makes none
            # The trace is in profile/ of the workdir. The first update also compiles.
            profile=0,  # the update from which on one rollout and update are traced; 0 traces none
            # Logging to Weights & Biases needs the extra 'wandb'.
            wandb='',  # the project that metrics are also sent to; '' sends none
        ),
        guard=c(  # against collapse; spg_jax/runs/guard.py says what a sign and a collapse are
            # A rollback changes what is learned, so the published recipe has none and only warns.
            rollbacks=0,  # times that a collapsed run goes back, at half the learning rate
            window=20,  # updates over which signs of collapse are averaged
            reward_fall=0.5,  # the share of its best reward whose loss is a collapse
            accuracy_fall=0.5,  # the share of its best validation accuracy whose loss is one
            skipped=5,  # so many non-finite updates in a row are one as well
        ),
        evaluation=c(  # on the validation and test splits, at temperature 0 except for pass@k
            lengths=(128, 256, 512),  # lengths of completions in tokens, all of them reported [E]
            steps=(64, 128, 256),  # denoising steps for each of evaluation.lengths [E]
            block_length=32,  # positions in a block, which is finished before the next starts [E]
            # What its rule reads besides, such as thresholds, is that of the group sampling.
            sampler='',  # the rule of commitment, as sampling.sampler; '' is low_confidence [E]
            every=100,  # updates between two validations
            problems=256,  # the number of problems in a validation
            batch=64,  # completions that are generated at once, on all devices together
            # As rl.compact. It compiles a few more programs, which pay where completions are long.
            compact=False,  # whether rows leave the batch that have ended, or wait for their block
            samples=8,  # k of pass@k, the share of problems that at least one of k samples solves
        ),
        checkpoint=c(
            every=100,  # updates between two checkpoints
            keep=2,  # the number of newest checkpoints that are kept
        ),
    )
    set_objective(config, objective)
    return config.lock()
