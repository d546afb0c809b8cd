"""Compiling a program in a thread while the devices do other work, such as evaluating the base."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from spg_jax.assembly import Parts
from spg_jax.data.batches import padded_length
from spg_jax.process import distributed
from spg_jax.runs.preparation import ProblemSets, Programs
from spg_jax.sharding import batch_sharding
from spg_jax.training.train_state import TrainState

T = TypeVar('T')


def update_ahead(
    programs: Programs, parts: Parts, problems: ProblemSets, state: TrainState, mesh: Mesh
) -> Programs:
    """Starts to compile the update, if it is known already how long its prompts will be.

    Args:
      programs: of the run.
      parts: say to which lengths prompts are padded.
      problems: their prompts have these lengths.
      state: the train state before the first update.
      mesh: the devices.

    Returns:
      The programs with an update whose first call waits until it is compiled.
    """
    lengths = problems.train.lengths
    padded = {padded_length(int(n), parts.prompt_lengths) for n in (lengths.min(), lengths.max())}
    if len(padded) > 1:
        return programs
    experience = programs.shapes(*padded, sharding=batch_sharding(mesh))
    update = compiled_ahead(programs.update, (state, experience), mesh)
    return programs._replace(update=update)


def compiled_ahead(program: Callable[..., T], arguments: tuple[Any, ...], mesh: Mesh) -> Any:
    """Starts to compile a program and returns it; its first call waits until that is done.

    JAX finds the compiled program again when it is called, so that results and cache are the same.

    Args:
      program: the result of `jax.jit`.
      arguments: arrays, or shapes with shardings, like those that it will be called with.
      mesh: the devices.
    """
    # GPUs try kernels out while they compile, which other work would disturb. The processes of a
    # job must compile in one order.
    if mesh.devices.flat[0].platform == 'gpu' or distributed.several():
        return program
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arguments
    )

    def compile_now() -> None:
        # The call of the program raises the same error, where it can be handled.
        with contextlib.suppress(Exception), jax.set_mesh(mesh):
            program.lower(*shapes).compile()

    thread = threading.Thread(target=compile_now, name='compiler')
    thread.start()

    @functools.wraps(program)
    def wait_and_call(*arguments: Any) -> T:
        thread.join()
        return program(*arguments)

    return wait_and_call
