"""The real programs of a run (rollout, evaluation, update) compiled for chips that are not there.

Nothing is computed: parameters and batches are shapes with shardings.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.config import (
    evaluation_lengths,
    evaluation_sampling,
    execution_of,
    generation_batch,
    lora_of,
    model_of,
    sampling_config,
    training_task,
)
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.models.attention import resolve
from spg_jax.models.llada import configuration
from spg_jax.models.lora import COLLECTION
from spg_jax.models.policy import Policy
from spg_jax.models.transformer import check_heads
from spg_jax.rl.learner import make_update
from spg_jax.rl.objectives import REGISTRY
from spg_jax.rl.rollout import Rollout, make_generate
from spg_jax.runs import policies
from spg_jax.training import optimizers
from spg_jax.training.train_state import TrainState, shardings_of

# config.json of huggingface.co/GSAI-ML/LLaDA-8B-Instruct, for those who have not downloaded it.
PUBLISHED = Path(__file__).parent / 'llada_8b_instruct.json'


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the programs of a run are made of. Leaves are `jax.ShapeDtypeStruct` with shardings."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    attention: str  # as the chips compute it
    policy: Policy
    state: TrainState
    rollout: Rollout


def make_plan(config: ml_collections.ConfigDict, mesh: Mesh, platform: str) -> Plan:
    """The abstract state and rollout of a configuration on a mesh of chips of a platform.

    Raises:
      ValueError: where the mesh does not divide the model or the rows.
    """
    policy = planned_policy(config, platform)
    check_heads(policy.config, mesh)
    attention = policy.config.attention
    if attention == 'cudnn':  # which JAX traces only where it finds it
        stand_in = dataclasses.replace(policy.config, attention='einsum')
        policy = dataclasses.replace(policy, config=stand_in)
    variables = {
        name: sharding.abstract_params(policy.model, mesh, collection=name)
        for name in ('params', *([COLLECTION] if policy.config.lora else []))
    }
    trained = {policy.trained: variables.pop(policy.trained)}
    whole = sharding.replicated(mesh)
    optimizer = optimizers.for_rl(config.optimizer, config.train.steps)
    placed = optimizers.state_shardings(optimizer, trained, shardings_of(trained), whole)
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = TrainState(
        step=counter,
        trained=trained,
        frozen=variables,
        opt_state=jax.tree.map(_placed, jax.eval_shape(optimizer.init, trained), placed),
        average=None,
        skipped=counter,
    )
    return Plan(config, mesh, attention, policy, state, _abstract_rollout(config, mesh))


def planned_policy(config: ml_collections.ConfigDict, platform: str) -> Policy:
    """The policy that RL would start from on chips of a platform, by sizes alone.

    A published checkpoint that is not there is taken to be LLaDA-8B-Instruct.

    Raises:
      ValueError: for a checkpoint of another architecture.
      FileNotFoundError: for a checkpoint directory without config.json.
    """
    if not config.base.checkpoint:
        tokenizer = WordTokenizer(training_task(config).vocabulary)
        policy = policies.make_policy(model_of(config, tokenizer.size, platform), tokenizer)
        model = dataclasses.replace(policy.config, lora=lora_of(config))
        return dataclasses.replace(policy, config=model)
    directory = Path(config.base.checkpoint)
    path = directory / 'config.json' if directory.is_dir() else PUBLISHED
    model, ids = configuration.read_config(path)
    execution = execution_of(config)
    execution['attention'] = resolve(execution['attention'], platform, model.dtype)
    model = dataclasses.replace(model, **execution, lora=lora_of(config))
    allowed = jnp.arange(model.vocab_size) != ids.mask  # which ids are words does not matter here
    return Policy(model, ids.mask, ids.eos, jax.device_get(allowed))


def program(plan: Plan, name: str) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function and the abstract arguments of 'rollout', 'evaluation' or 'update'.

    Evaluation is at the longest completions, which need most.
    """
    config, policy = plan.config, plan.policy
    if name == 'update':
        optimizer = optimizers.for_rl(config.optimizer, config.train.steps)
        objective = REGISTRY[config.rl.objective](config)
        update = make_update(policy, objective, optimizer, config, shardings_of(plan.state))
        return update, (plan.state, plan.rollout)
    if name == 'rollout':
        rows, decoding = generation_batch(config), sampling_config(config)
    else:
        rows = evaluation_rows(plan)
        decoding = evaluation_sampling(config, *max(evaluation_lengths(config)))
    by_rows = sharding.batch_sharding(plan.mesh)
    prompt = (rows, config.sampling.prompt_length)
    return make_generate(policy, decoding), (
        plan.state.variables,
        jax.ShapeDtypeStruct(prompt, jnp.int32, sharding=by_rows),
        jax.ShapeDtypeStruct(prompt, bool, sharding=by_rows),
        jax.ShapeDtypeStruct((rows,), jax.random.key(0).dtype, sharding=by_rows),
    )


def evaluation_rows(plan: Plan) -> int:
    """Rows that evaluation generates at once: its batch, filled up to equal shards."""
    shards = sharding.row_shards(plan.mesh)
    return -(-plan.config.evaluation.batch // shards) * shards


class Compiled(NamedTuple):
    """What the compiler says of a program."""

    memory: Any  # `CompiledMemoryStats`, bytes a chip
    text: str  # HLO


def compile_program(plan: Plan, name: str) -> Compiled:
    """Compiles for the TPUs of the mesh, which only the compiler needs to know."""
    run, arguments = program(plan, name)
    # Not jax.set_mesh: under it even a constant would have to be computed on those devices.
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
        lowered = run.lower(*arguments)
    # Not compiled.as_text(): it cannot read programs that use the sparse cores of a v6e.
    with tempfile.TemporaryDirectory() as directory:
        options = {'xla_dump_to': directory, 'xla_dump_hlo_as_text': True}
        compiled = lowered.compile(compiler_options=options)
        (path,) = Path(directory).glob('*.after_optimizations.txt')
        return Compiled(compiled.memory_analysis(), path.read_text())


def lower_for_cuda(plan: Plan, name: str) -> int:
    """Lowers for CUDA without a CUDA device; returns the bytes of the program's text."""
    run, arguments = program(plan, name)
    with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
        return len(jax.export.export(run, platforms=['cuda'])(*arguments).mlir_module_serialized)


def _abstract_rollout(config: ml_collections.ConfigDict, mesh: Mesh) -> Rollout:
    rows = config.rl.prompts * config.rl.group_size
    prompt, length = config.sampling.prompt_length, config.sampling.length
    shards = sharding.row_shards(mesh)
    if rows % shards:
        raise ValueError(
            f'{rows} rows of a rollout batch (rl.prompts x rl.group_size) do not split over '
            f'{shards} shards of rows (mesh.data x mesh.fsdp); change one of them'
        )
    by_rows = sharding.batch_sharding(mesh)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=by_rows)

    return Rollout(
        prompt=array(jnp.int32, prompt),
        prompt_mask=array(jnp.bool_, prompt),
        completion=array(jnp.int32, length),
        scored=array(jnp.bool_, length),
        commit_step=array(jnp.int32, length),
        reward=array(jnp.float32),
        advantage=array(jnp.float32),
        example_id=array(jnp.uint32),
    )


def _placed(leaf: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
