"""Which methods `spg_jax.compare` compares on which tasks; docs/compare.md explains the protocol.

python -m spg_jax.compare --config=configs/compare.py:smoke    # does it all run? a minute
python -m spg_jax.compare --config=configs/compare.py          # quick: eight methods, Countdown
python -m spg_jax.compare --config=configs/compare.py:full     # every method, Countdown and Sudoku
python -m spg_jax.compare --config=compare --config.methods=spg_mixture,d1 --config.seeds=2
python -m spg_jax.compare --config=compare --config.overrides='corruption.draws=2'
python -m spg_jax.compare --config=compare --config.methods=mine \
    --config.arms.mine='rl.objective=examples.own_objective own_objective.temperature=0.5'

An arm of your own is one line of ARMS, or of the command line as above.
"""

import ml_collections
from ml_collections import config_dict

from spg_jax.errors import nearest

# Masks that prefer positions which influence others, numbers of masked tokens spread evenly over
# the draws, and a guard that goes back after a collapse; then with each bound centred by itself.
BETTER_DRAWS = 'corruption.informed=True corruption.times=stratified guard.rollbacks=3'
RECIPE = f'spg.baseline=each {BETTER_DRAWS}'

# Settings as on a command line. Whatever an arm does not set is that of the task.
ARMS = {
    'spg_mixture': 'spg.negative=mixture',
    'spg_elbo': 'spg.negative=elbo',
    'spg_eubo': 'spg.negative=eubo',
    'spg_none': 'spg.negative=none',
    'spg_mixture_centred': 'spg.negative=mixture spg.baseline=each',
    'spg_eubo_centred': 'spg.negative=eubo spg.baseline=each',
    'agrpo': 'rl.objective=agrpo',
    'bgpo': 'rl.objective=bgpo',
    'coupled_grpo': 'rl.objective=coupled_grpo',
    'd1': 'rl.objective=d1',
    'd2': 'rl.objective=d2 d2.segments=4',
    'dmpo': 'rl.objective=dmpo',
    # Published phases of 1200 updates would not end within the budget of a laptop.
    'dtm': 'rl.objective=dtm dtm.phase=40 dtm.every=4',
    'ebpo': 'rl.objective=ebpo',
    'espo': 'rl.objective=espo',
    'gdpo': 'rl.objective=gdpo',
    'gdsd': 'rl.objective=gdsd',
    'just_grpo': 'rl.objective=just_grpo sampling.commit=left_to_right',
    'rspo': 'rl.objective=rspo',
    'tracerl': 'rl.objective=tracerl',
    'unigrpo': 'rl.objective=unigrpo',
    'vrpo': 'rl.objective=vrpo',
    'wd1': 'rl.objective=wd1',
    # Supervised fine-tuning on right completions of the base policy, which about a third of the
    # budget of the tasks below samples.
    'rejection': 'rl.objective=spg_jax.rl.rejection rejection.batches=36',
    # A policy that edits its drafts, and the same with credit for the drafts alone.
    'autoedit': 'rl.objective=autoedit sampling.sampler=autoedit',
    'autoedit_draft': 'rl.objective=autoedit sampling.sampler=autoedit autoedit.credit=draft',
    # Ablations of SPG.
    'spg_uniform': 'corruption.kind=uniform',
    'spg_informed': 'corruption.informed=True',
    'spg_block': 'spg.estimator=block',
    **{f'spg_beta_{beta}': f'spg.beta={beta}.0' for beta in (1, 2, 4)},
    **{f'spg_omega_{omega}': f'spg.omega={omega / 100}' for omega in (0, 25, 75, 100)},
    **{f'spg_draws_{draws}': f'corruption.draws={draws}' for draws in (1, 2, 8)},
    **{f'spg_inner_{updates}': f'rl.inner_updates={updates}' for updates in (1, 4, 8)},
    'spg_none_draws_1': 'spg.negative=none corruption.draws=1',
    # All that shall make SPG better, with the four draws of the tasks below, with eight, with the
    # lower bound for completions of both signs, and for better completions alone.
    'spg_recipe': RECIPE,
    'spg_recipe_draws_8': f'{RECIPE} corruption.draws=8',
    'spg_recipe_elbo': f'{RECIPE} spg.negative=elbo',
    'spg_recipe_none': f'{BETTER_DRAWS} spg.negative=none',
}

# The base policies of all recorded tables, which are older than the use of Muon.
OLDER_BASE = 'base.muon_rate=0.0 base.batch_size=128'
# The configuration of each task, and changes of it. `train.steps` are the updates of the reference,
# which say how large the budget is.
CONFIGS = {
    'countdown': f'countdown:small {OLDER_BASE}',
    # Half the batch of the main job, so that all runs fit into some hours.
    'sudoku': f'sudoku:small {OLDER_BASE} rl.prompts=8 rl.microbatch=64 train.steps=100',
    'countdown_tiny': 'countdown:tiny train.steps=6',
    # Base policies that were trained to correct answers as well, half of them as long as in the
    # main jobs. Every evaluation edits, and says how good the drafts were.
    'sudoku_edited': f'sudoku:small {OLDER_BASE} base.edit_weight=1.0 '
    'base.stages=((500,1.0),(125,0.15)) evaluation.sampler=autoedit '
    'rl.prompts=8 rl.microbatch=64 train.steps=60',
    'countdown_edited': f'countdown:small {OLDER_BASE} base.edit_weight=1.0 '
    'base.stages=((650,1.0),(150,0.15)) evaluation.sampler=autoedit train.steps=60',
}

# Settings of all runs: what only costs time here.
COMMON = 'evaluation.samples=1 train.diagnose_every=0 checkpoint.keep=1'
BOUNDS = ('spg_mixture', 'spg_elbo', 'spg_eubo', 'spg_none')
RIVALS = ('d1', 'wd1', 'unigrpo', 'dtm')
OTHERS = ('agrpo', 'bgpo', 'coupled_grpo', 'd2', 'dmpo', 'ebpo', 'espo', 'gdpo', 'gdsd')
OTHERS += ('just_grpo', 'rspo', 'tracerl', 'vrpo')


def _ablation(*beginnings: str, budget: str = 'updates') -> dict:
    """SPG beside the arms of ablations, on Countdown."""
    arms = [name for name in ARMS if name.startswith(beginnings)]
    return dict(methods=' '.join(['spg_mixture', *arms]), budget=budget)


PRESETS = {
    'smoke': dict(
        methods='spg_mixture d1',
        tasks='countdown_tiny',
        seeds=2,
        rates=(1e-3, 3e-3),
        validations=2,
    ),
    'quick': dict(methods=' '.join([*BOUNDS, 'd1', 'wd1', 'unigrpo', 'rejection'])),
    'full': dict(
        methods=' '.join([*BOUNDS, *RIVALS, 'rejection', *OTHERS]),
        tasks='sudoku countdown',
        seeds_of=dict.fromkeys([*BOUNDS, *RIVALS], 5),
    ),
    # Seconds of an update of every method beside those of SPG, for an idle machine.
    'cost': dict(
        methods=' '.join([*BOUNDS, *RIVALS, *OTHERS]),
        tasks='sudoku countdown',
        common=f'{COMMON} train.steps=40',
        seeds=1,
        rates=(3e-4,),
        budget='updates',
        validations=1,
    ),
    # Share of the runs that collapse, after which update, and what is left at the end.
    'centred': dict(
        methods='spg_mixture spg_mixture_centred spg_eubo spg_eubo_centred',
        tasks='sudoku countdown',
        common=f'{COMMON} train.steps=1000',
        seeds=5,
        rates=(3e-4,),  # of the main jobs; the question is what happens at it
        budget='updates',
        validations=50,
    ),
    # The tables of docs/results.md.
    'side_by_side': dict(
        methods=' '.join([*BOUNDS, 'spg_uniform', 'spg_block']),
        tasks='sudoku',
        budget='updates',
        tuning_share=1.0,
    ),
    'learning': dict(
        methods='spg_mixture rejection',
        tasks='sudoku countdown',
        rates=(3e-4, 1e-3),
        tuning_share=1.0,
        own_bases=True,
    ),
    # What editing is worth before and after reinforcement learning of draft, answer or both.
    'editing': dict(
        methods='spg_mixture autoedit autoedit_draft',
        tasks='sudoku_edited countdown_edited',
        rates=(3e-4,),
        budget='updates',
        validations=4,
        own_bases=True,
    ),
    'negative': dict(methods=' '.join(BOUNDS), budget='updates'),
    'ablations': _ablation('spg_uniform', 'spg_informed', 'spg_beta', 'spg_omega'),
    'draws_and_inner': _ablation('spg_draws', 'spg_inner', budget='sequences'),
    'recipe': dict(
        methods='spg_mixture spg_none spg_recipe spg_recipe_draws_8 spg_recipe_elbo '
        'spg_recipe_none spg_draws_1 spg_none_draws_1',
        tasks='sudoku countdown',
        seeds=5,
    ),
}


def get_config(preset: str = 'quick') -> ml_collections.ConfigDict:
    """The configuration of a preset."""
    config = config_dict.create(
        # What there is to choose from: settings by the name of an arm, and of a task.
        arms=ARMS,
        configs=CONFIGS,
        # What is compared: names with commas or spaces between them.
        methods='spg_mixture',
        tasks='countdown',
        reference='spg_mixture',  # the arm that all others are compared with
        seeds=3,  # runs of each arm, with seeds 0, 1, …
        seeds_of={},  # the same of single arms, by name
        # The learning rate is chosen by the best validation of runs with another seed.
        rates=(1e-4, 3e-4, 1e-3),  # the grid of learning rates, ascending; one is not tuned
        tuning_seed=100,
        tuning_share=0.4,  # the updates of a run that tries a rate, as a share of all
        budget='sequences',  # what all arms get the same of: sequences, forward, backward, updates
        validations=6,  # of each run, from which its checkpoint is chosen
        own_bases=False,  # whether each seed trains a base policy of its own
        # Settings of all runs as on their command line: those of this file, and those of a user.
        common=COMMON,
        overrides='',
    )
    if preset not in PRESETS:
        near = nearest(preset, PRESETS)
        perhaps = f', perhaps {near}' if near else ''
        raise ValueError(
            f'configs/compare.py has no preset {preset!r}{perhaps}; use one of {", ".join(PRESETS)}'
        )
    with config.unlocked():
        config.update(PRESETS[preset])
    return config
