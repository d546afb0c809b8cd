"""What a run of reinforcement learning is made of: problems, base policy and programs."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ml_collections
import optax
from jax.sharding import Mesh

from spg_jax.assembly import Parts
from spg_jax.data import batches
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.models.policy import Policy, Variables, check_adapters, with_adapters
from spg_jax.process import distributed
from spg_jax.random import check_range
from spg_jax.rl.arrival import make_arrival
from spg_jax.rl.collection import make_collect
from spg_jax.rl.diagnostics import Diagnosis, make_diagnosis
from spg_jax.rl.evaluator import Evaluator
from spg_jax.rl.experience import collections_due, experience_shapes, make_keep
from spg_jax.rl.gap import make_gap
from spg_jax.rl.gradient import other_policies
from spg_jax.rl.learner import kept_policies, make_update
from spg_jax.rl.objectives import Objective
from spg_jax.rl.rollout import Rollout
from spg_jax.runs import policies
from spg_jax.tasks.listed import Listed
from spg_jax.tasks.source import Source
from spg_jax.tasks.task import Example
from spg_jax.training import optimizers
from spg_jax.training.train_state import Metrics, TrainState, initial_state, shardings_of

if TYPE_CHECKING:
    import grain

# What changes what a run learns though no setting names it, in words.
ORIGINS = {
    'problems': 'set of problems',
    'base_policy': 'base policy in base.cache',
}


class ProblemSets(NamedTuple):
    """The problems of a run, by what they are for."""

    train: batches.Problems
    validation: list[Example]
    test: list[Example]
    digest: str  # of all of them; '' if nobody knows one


def read_problems(
    config: ml_collections.ConfigDict, parts: Parts, tokenizer: Tokenizer
) -> ProblemSets:
    """Finds or makes the problems, and measures every training prompt before any is used.

    Raises:
      ValueError: problems cannot be had, or prompts do not fit.
    """
    with distributed.leader_first('problems'):
        source = parts.task.source('train', config.task.data_dir)
    check_range(len(source), parts.batching.group_size)
    validation = parts.task.source('validation', config.task.data_dir)
    test = parts.task.source('test', config.task.data_dir)
    train, message = batches.fit_prompts(
        parts.task, tokenizer, source, config.sampling.prompt_length, config.data.long_prompts
    )
    if message:
        print(message, flush=True)
    digest = source.digest() if isinstance(source, Source | Listed) else ''
    return ProblemSets(train, validation[: config.evaluation.problems], list(test), digest)


Update = Callable[[TrainState, Rollout], tuple[TrainState, Metrics]]


class Programs(NamedTuple):
    """What a run calls: the policy and the compiled functions around it."""

    policy: Policy
    tokenizer: Tokenizer
    prompts: 'grain.DatasetIterator'  # endless batches of training prompts
    collect: Callable[[TrainState, batches.PromptBatch, int], tuple[Rollout, list[str]]]
    # (state that sampled, rollout, updates done) -> metrics, which may be none
    gap: Callable[[TrainState, Rollout, int], Metrics]
    due: Callable[[int], int]  # updates done -> batches of prompts to collect before the next
    # (padded length of prompts, sharding=None) -> shapes of the experience
    shapes: Callable[..., Rollout]
    # (experience, rollout just collected, updates done, batches collected before it) -> experience
    keep: Callable[[Rollout | None, Rollout, int, int], Rollout]
    update: Update
    update_at: Callable[[float], Update]  # share of the learning rate -> the update at that share
    begin: Callable[[], TrainState]  # the train state before the first update, read from disk anew
    diagnosis: Diagnosis | None
    evaluator: Evaluator


def prepare(
    config: ml_collections.ConfigDict, parts: Parts, base: Path, mesh: Mesh, planned_steps: int
) -> tuple[TrainState, ProblemSets, Programs]:
    """Reads problems and base policy, and makes the train state and the programs of a run.

    The learning rate warms up for a share of `planned_steps`, the updates that were asked for when
    the run began.

    Weights may be large, so they are read after everything else was found to fit.

    Raises:
      ValueError, FileNotFoundError: base policy, adapters or problems cannot be used.
    """
    seed, batching = config.train.seed, parts.batching
    adapters = policies.check_policy(base, mesh, parts.adapter)
    check_adapters(adapters, parts.lora, where=parts.adapter or base)
    problems = read_problems(config, parts, policies.load_tokenizer(base))
    objective = parts.objective
    kept = kept_policies(objective, new_adapters=parts.lora is not None and adapters is None)

    def optimizer_at(share: float) -> optax.GradientTransformation:
        rate = share * parts.optimizer.learning_rate
        settings = dataclasses.replace(parts.optimizer, learning_rate=rate)
        return optimizers.for_rl(settings, planned_steps, objective.rate)

    def begin() -> tuple[Policy, Tokenizer, TrainState]:
        policy, tokenizer, variables = policies.load_policy(
            base, mesh, parts.adapter, **parts.execution
        )
        policy, variables = with_adapters(policy, variables, parts.lora, seed, mesh)
        optimizer = optimizer_at(1.0)
        state = initial_state(variables, optimizer, policy, mesh, average=False, kept=kept)
        return policy, tokenizer, state

    policy, tokenizer, state = begin()
    shardings = shardings_of(state)

    def update_at(share: float) -> Update:
        return make_update(policy, objective, optimizer_at(share), batching, seed, shardings)

    prompts = batches.prompts(
        parts.task,
        tokenizer,
        problems.train,
        batch_size=batching.prompts,
        buckets=parts.prompt_lengths,
        seed=seed,
        truncate=config.data.long_prompts == 'truncate_left',
        local_prompts=batching.local_prompts(mesh),
    )
    arrival = make_arrival(policy, objective, batching, seed)
    diagnosis = None
    if config.train.diagnose_every:
        diagnosis = make_diagnosis(policy, batching, parts.sampling.block_length, seed)
    programs = Programs(
        policy=policy,
        tokenizer=tokenizer,
        prompts=prompts,
        collect=_make_collect(parts, policy, tokenizer, arrival, seed, mesh),
        gap=_make_gap(parts, policy, seed),
        due=partial(collections_due, objective, batching),
        shapes=partial(
            experience_shapes,
            objective,
            batching,
            arrival,
            state,
            decoding=parts.sampling,
            vocab_size=policy.config.vocab_size,
        ),
        keep=make_keep(objective, batching, parts.prompt_lengths[-1]),
        update=update_at(1.0),
        update_at=update_at,
        begin=lambda: begin()[-1],
        diagnosis=diagnosis,
        evaluator=Evaluator(policy, parts.evaluation_task, tokenizer, parts.evaluation, mesh),
    )
    return state, problems, programs


def _make_collect(
    parts: Parts,
    policy: Policy,
    tokenizer: Tokenizer,
    arrival: Callable[[TrainState, Rollout], Rollout] | None,
    seed: int,
    mesh: Mesh,
) -> Callable[[TrainState, batches.PromptBatch, int], tuple[Rollout, list[str]]]:
    """A function (state, prompts, step) -> (rollout, texts), with the extras of the objective."""
    objective, batching = parts.objective, parts.batching
    sample = make_collect(
        policy, parts.task, tokenizer, parts.sampling, batching, objective.advantage, seed, mesh
    )

    def collect(
        state: TrainState, prompts: batches.PromptBatch, step: int
    ) -> tuple[Rollout, list[str]]:
        rollout, texts = sample(_sampler(objective, state), prompts, step)
        return arrival(state, rollout) if arrival else rollout, texts

    return collect


def _make_gap(
    parts: Parts, policy: Policy, seed: int
) -> Callable[[TrainState, Rollout, int], Metrics]:
    """A function (state, rollout, step) -> `rl.gap`, or nothing where nothing was recorded."""
    gap = make_gap(policy, parts.sampling, parts.batching, seed)
    if gap is None:
        return lambda state, rollout, step: {}
    return lambda state, rollout, step: gap(_sampler(parts.objective, state), rollout, step)


def _sampler(objective: Objective, state: TrainState) -> Variables:
    """The parameters that sample rollouts."""
    if objective.sampled_by:
        return other_policies(state.frozen, state.kept)[objective.sampled_by]
    return state.variables


def origins_of(parts: Parts, problems: ProblemSets, base: Path) -> dict[str, str]:
    """Digests of what a run is made of that its settings do not name, by the keys of ORIGINS.

    A published base policy is a file that the settings name, and a run that trains every parameter
    reads its base policy only once.
    """
    base_digest = policies.digest_of(base) if parts.lora else ''
    digests = {'problems': problems.digest, 'base_policy': base_digest}
    return {name: digest for name, digest in digests.items() if digest}


def check_origins(workdir: Path, saved: dict[str, str], origins: dict[str, str]) -> None:
    """Raises ValueError if a run began with other problems or another base policy.

    Args:
      workdir: of the run.
      saved: what `origins_of` returned when the run began, {} if that was not written down.
      origins: what it returns now.
    """
    for name, digest in origins.items():
        if saved.get(name, digest) != digest:
            raise ValueError(
                f'{workdir} began with another {ORIGINS[name]}; put that one back, or use another '
                '--workdir'
            )
