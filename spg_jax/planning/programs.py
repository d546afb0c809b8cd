"""The real programs of a run (rollout, evaluation, update), compiled for chips that are not there.

The fine-tuning of a checkpoint on demonstrations has a plan of its own, with one program.

Nothing is computed, because parameters and batches are shapes with shardings and have no values.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.assembly import Parts, assemble, fit_to_model, model_of
from spg_jax.data.demonstrations import Corrections, Demonstrations
from spg_jax.data.tokenizers import word_tokenizer
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.models.attention import resolve
from spg_jax.models.families import read_config
from spg_jax.models.lora import COLLECTION
from spg_jax.models.policy import Policy
from spg_jax.models.transformer import check_heads
from spg_jax.random import root_key
from spg_jax.rl.arrival import make_arrival
from spg_jax.rl.collection import make_generate
from spg_jax.rl.experience import collected_shapes, experience_shapes
from spg_jax.rl.gradient import rows_at_once
from spg_jax.rl.learner import kept_policies, make_update
from spg_jax.rl.objectives.objective import token_log_probs
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import logit_pieces
from spg_jax.runs import policies
from spg_jax.training import optimizers
from spg_jax.training.supervised import make_step
from spg_jax.training.train_state import TrainState, shardings_of

FINE_TUNING = 'fine-tuning'  # the program of that name
# Copies of config.json of published checkpoints, to plan without them, by a part of their names.
# The first is that of huggingface.co/GSAI-ML/LLaDA-8B-Instruct, for all other names.
PUBLISHED = {
    '': 'llada_8b_instruct.json',
    'llada2': 'llada2_mini.json',
    'llada-moe': 'llada_moe_7b_a1b.json',
    'dream': 'dream_7b.json',
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the programs of a run are made of. Arrays are `jax.ShapeDtypeStruct` with shardings."""

    parts: Parts
    steps: int  # updates of the run
    seed: int  # train.seed
    mesh: Mesh
    attention: str  # the implementation that the chips use
    policy: Policy
    state: TrainState
    rollout: Rollout | None  # what updates learn from; None in fine-tuning
    base: ml_collections.ConfigDict  # the group of settings of fine-tuning

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs of a run; 'arrival' is there if the objective reads rollouts out."""
        if self.rollout is None:
            return (FINE_TUNING,)
        objective = self.parts.objective
        arrives = objective.behaviour or objective.at_rollout is not None
        return ('rollout', 'evaluation', *(['arrival'] if arrives else []), 'update')

    @property
    def draws(self) -> int:
        """The maskings of each row that an update learns from; a correction counts as one."""
        if self.rollout is None:
            return 2 if self.base.edit_weight else 1
        return self.parts.objective.draws

    @property
    def rows_of_update(self) -> int:
        """Rows that an update learns from."""
        if self.rollout is None:
            return self.base.batch_size
        ring = self.parts.objective.experience
        return ring.rows if ring else self.parts.batching.rows

    @property
    def rows_at_once(self) -> int:
        """Rows that an update differentiates at once, over all chips."""
        if self.rollout is None:
            return self.base.batch_size
        batching = self.parts.batching
        return rows_at_once(
            self.parts.objective,
            self.rows_of_update,
            batching.microbatch,
            batching.group_size,
            sharding.row_shards(self.mesh),
        )

    def logit_pieces(self, rows: int) -> int:
        """The pieces of a completion whose logits are held at once.

        Args:
          rows: corrupted completions that are read out at once, over all chips.
        """
        if self.rollout is None or self.parts.objective.readout is not token_log_probs:
            return 1
        return logit_pieces(
            rows // sharding.row_shards(self.mesh),
            self.parts.sampling.length,
            self.policy.config.vocab_size // self.mesh.shape['tensor'],
        )

    @property
    def prompt_length(self) -> int:
        """P, the longest length that training prompts are padded to."""
        return self.parts.prompt_lengths[-1]

    def decoding(self, name: str) -> SamplingConfig:
        """How 'rollout' decodes, or how 'evaluation' decodes its longest completions."""
        if name == 'rollout':
            return self.parts.sampling
        return max(self.parts.evaluation.decodings, key=lambda each: (each.length, each.steps))

    def rows(self, name: str) -> int:
        """Rows that 'rollout' or 'evaluation' generates at once, over all chips.

        The batch of an evaluation is filled up to equal shards.
        """
        if name == 'rollout':
            return self.parts.batching.rows_at_once
        shards = sharding.row_shards(self.mesh)
        return -(-self.parts.evaluation.batch // shards) * shards


def make_plan(
    config: ml_collections.ConfigDict, mesh: Mesh, platform: str, fine_tuning: bool = False
) -> Plan:
    """The abstract state and rollout of a configuration on a mesh of chips of a platform.

    With `fine_tuning` it is the plan of `spg_jax.pretrain` from the checkpoint, and not of RL.

    Raises:
      ValueError: if the mesh does not divide the model or the rows.
    """
    parts = assemble(config)
    policy = planned_policy(config, platform)
    if not fine_tuning:
        parts = fit_to_model(config, parts, dataclasses.replace(policy.config, lora=None))
    check_heads(policy.config, mesh)
    attention = policy.config.attention
    if attention == 'cudnn':  # JAX traces it only where cuDNN is installed.
        stand_in = dataclasses.replace(policy.config, attention='einsum')
        policy = dataclasses.replace(policy, config=stand_in)
    variables = {
        name: sharding.abstract_params(policy.model, mesh, collection=name)
        for name in ('params', *([COLLECTION] if policy.config.lora else []))
    }
    trained = {policy.trained: variables.pop(policy.trained)}
    whole = sharding.replicated(mesh)
    optimizer = optimizers.for_rl(parts.optimizer, config.train.steps, parts.objective.rate)
    if fine_tuning:
        optimizer = _fine_tuner(config.base, parts)
    placed = optimizers.state_shardings(optimizer, trained, shardings_of(trained), whole)
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = TrainState(
        step=counter,
        trained=trained,
        frozen=variables,
        opt_state=jax.tree.map(_placed, jax.eval_shape(optimizer.init, trained), placed),
        average=trained if fine_tuning else None,
        skipped=counter,
        kept={}
        if fine_tuning
        else {name: trained for name in kept_policies(parts.objective, parts.lora is not None)},
    )
    seed, rollout = config.train.seed, None
    if not fine_tuning:
        rollout = _abstract_rollout(parts, policy, state, seed, mesh)
    return Plan(
        parts=parts,
        steps=config.train.steps,
        seed=config.train.seed,
        mesh=mesh,
        attention=attention,
        policy=policy,
        state=state,
        rollout=rollout,
        base=config.base,
    )


def _fine_tuner(base: ml_collections.ConfigDict, parts: Parts) -> optax.GradientTransformation:
    total = sum(stage.steps for stage in parts.stages)
    return optimizers.for_pretraining(
        base.learning_rate, base.weight_decay, base.grad_clip, total, base.muon_rate
    )


def planned_policy(config: ml_collections.ConfigDict, platform: str) -> Policy:
    """The policy that RL would start from on chips of a platform; only its sizes are right.

    A published checkpoint that does not exist here is taken to be what its name says.

    Raises:
      ValueError: if the checkpoint has another architecture.
      FileNotFoundError: if the checkpoint directory has no config.json.
    """
    parts = assemble(config)
    if not config.base.checkpoint:
        tokenizer = word_tokenizer(parts.task)
        policy = policies.make_policy(model_of(config, tokenizer.size, platform), tokenizer)
        model = dataclasses.replace(policy.config, lora=parts.lora)
        return dataclasses.replace(policy, config=model)
    directory = Path(config.base.checkpoint)
    path = directory / 'config.json' if directory.is_dir() else published_copy(directory)
    model, ids = read_config(path)
    attention = resolve(parts.execution['attention'], platform, model.dtype)
    execution = parts.execution | {'attention': attention}
    lora = parts.lora and parts.lora.for_kernels(model.adapted_kernels)
    model = dataclasses.replace(model, **execution, lora=lora)
    allowed = jnp.arange(model.vocab_size) != ids.mask  # other ids do not matter to the sizes
    return Policy(model, ids.mask, ids.eos, jax.device_get(allowed))


def published_copy(directory: Path) -> Path:
    """The copy of config.json of the published checkpoint that a directory would hold."""
    name = directory.name.lower()
    part = next((part for part in reversed(PUBLISHED) if part in name), '')
    return Path(__file__).parent / PUBLISHED[part]


def program(plan: Plan, name: str) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function and the abstract arguments of a program, one of `Plan.programs`."""
    parts, policy = plan.parts, plan.policy
    if name == FINE_TUNING:
        base, by_rows = plan.base, sharding.batch_sharding(plan.mesh)
        step = make_step(
            policy,
            _fine_tuner(base, parts),
            base.seed,
            base.ema,
            shardings_of(plan.state),
            base.edit_weight,
            base.random_rate,
            base.keep_weight,
        )
        prompt = plan.rows_of_update, plan.prompt_length
        completion = jax.ShapeDtypeStruct(
            (plan.rows_of_update, parts.sampling.length), jnp.int32, sharding=by_rows
        )
        batch = Demonstrations(
            prompt=jax.ShapeDtypeStruct(prompt, jnp.int32, sharding=by_rows),
            prompt_mask=jax.ShapeDtypeStruct(prompt, bool, sharding=by_rows),
            completion=completion,
            index=jax.ShapeDtypeStruct(prompt[:1], jnp.uint32, sharding=by_rows),
            corrections=Corrections(completion, completion) if base.edit_weight else None,
        )
        return step, (plan.state, batch)
    if name == 'arrival':
        collected = collected_shapes(
            parts.batching.rows,
            plan.prompt_length,
            parts.sampling,
            policy.config.vocab_size,
            sharding.batch_sharding(plan.mesh),
        )
        arrival = make_arrival(policy, parts.objective, parts.batching, plan.seed)
        return arrival, (plan.state, collected)
    if name == 'update':
        optimizer = optimizers.for_rl(parts.optimizer, plan.steps, parts.objective.rate)
        shardings = shardings_of(plan.state)
        update = make_update(
            policy, parts.objective, optimizer, parts.batching, plan.seed, shardings
        )
        return update, (plan.state, plan.rollout)
    rows, by_rows = plan.rows(name), sharding.batch_sharding(plan.mesh)
    prompt = (rows, plan.prompt_length)
    return make_generate(policy, plan.decoding(name)), (
        plan.state.variables,
        jax.ShapeDtypeStruct(prompt, jnp.int32, sharding=by_rows),
        jax.ShapeDtypeStruct(prompt, bool, sharding=by_rows),
        jax.ShapeDtypeStruct((rows,), root_key(0).dtype, sharding=by_rows),
    )


class Compiled(NamedTuple):
    """What the compiler reports about a program."""

    memory: Any  # `CompiledMemoryStats`, in bytes on each chip
    text: str  # HLO


def compile_program(plan: Plan, name: str) -> Compiled:
    """Compiles a program for the TPUs of the mesh, which do not have to be there."""
    run, arguments = program(plan, name)
    # Under jax.set_mesh even a constant would have to be computed on those devices.
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
        lowered = run.lower(*arguments)
    # The text comes from a dump, because compiled.as_text() fails for the sparse cores of a v6e.
    with tempfile.TemporaryDirectory() as directory:
        options = {'xla_dump_to': directory, 'xla_dump_hlo_as_text': True}
        compiled = lowered.compile(compiler_options=options)
        (path,) = Path(directory).glob('*.after_optimizations.txt')
        return Compiled(compiled.memory_analysis(), path.read_text())


def lower_for_cuda(plan: Plan, name: str) -> int:
    """Lowers a program for CUDA without a CUDA device; returns the bytes of the lowered module."""
    run, arguments = program(plan, name)
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
        exported = jax.export.export(jax.jit(run), platforms=['cuda'])(*arguments)
        return len(exported.mlir_module_serialized)


def _abstract_rollout(
    parts: Parts, policy: Policy, state: TrainState, seed: int, mesh: Mesh
) -> Rollout:
    rows = parts.batching.rows
    shards = sharding.row_shards(mesh)
    if rows % shards:
        raise ValueError(
            f'{rows} rows of a rollout batch (rl.prompts x rl.group_size) do not split over '
            f'{shards} shards of rows (mesh.data x mesh.fsdp); change one of them'
        )
    arrival = make_arrival(policy, parts.objective, parts.batching, seed)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return experience_shapes(
            parts.objective,
            parts.batching,
            arrival,
            state,
            parts.prompt_lengths[-1],
            parts.sampling,
            policy.config.vocab_size,
            sharding.batch_sharding(mesh),
        )


def _placed(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
