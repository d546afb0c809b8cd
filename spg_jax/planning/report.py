"""The plan of a run on a machine: its programs, whether they fit, and how long they take."""

import dataclasses
import time
from collections.abc import Collection
from typing import Any

import jax
import ml_collections

from spg_jax import sharding
from spg_jax.assembly import assemble, check_mesh
from spg_jax.planning import collectives, costs, memory
from spg_jax.planning.machines import GIB, Chip, Machine
from spg_jax.planning.programs import (
    FINE_TUNING,
    Plan,
    compile_program,
    lower_for_cuda,
    make_plan,
)
from spg_jax.planning.savings import Expected, work_left
from spg_jax.rl.experience import collections_due


@dataclasses.dataclass(frozen=True)
class Program:
    """What one program needs of each chip."""

    flops: float
    bytes: float  # moved between the chip and its memory
    estimated: dict[str, float]  # bytes by formula beside those that stay: part -> bytes
    compiled: int | None  # the same by the compiler; None if there is no figure of the compiler
    exceeded: str  # the message of the compiler if the program does not fit, otherwise ''
    code: int  # bytes of the program's code
    collectives: dict[str, tuple[int, float]]  # kind -> (runs, bytes received in all runs)
    seconds: float  # time that compiling or lowering took

    @property
    def estimate(self) -> float:
        """The bytes that the program needs beside those that stay, by formula."""
        return sum(self.estimated.values())

    @property
    def needed(self) -> float:
        """The same bytes by the compiler if it gave a figure, otherwise by formula."""
        return self.estimate if self.compiled is None else self.compiled

    @property
    def received(self) -> float:
        """The bytes that a chip receives in all collectives."""
        return sum(received for _, received in self.collectives.values())

    def limits(self, chip: Chip) -> dict[str, float]:
        """Seconds that arithmetic, memory and links need at the chip's published rates.

        The program takes at least as long as the longest of them.
        """
        return {
            'arithmetic': self.flops / chip.flops,
            'memory': self.bytes / chip.bandwidth,
            'links': self.received / chip.links,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """The figures of a configuration on a machine."""

    topology: str
    mesh: dict[str, int]  # axis -> chips along it
    attention: str  # the implementation that the chips use
    resident: memory.Resident
    programs: dict[str, Program]
    # Program -> the expected share of its work that is left, 1 where there is none.
    left: dict[str, float] = dataclasses.field(default_factory=dict)

    def peak(self, name: str) -> float:
        """The bytes of a chip while a program runs: resident ones, all code, and the program's."""
        code = sum(program.code for program in self.programs.values())
        return self.resident.total + code + self.programs[name].needed

    def deviation(self, name: str) -> float | None:
        """How far the peak by formula is from the compiler's, as a share of the latter."""
        program = self.programs[name]
        if program.compiled is None:
            return None
        return (program.estimate - program.needed) / self.peak(name)

    @property
    def largest(self) -> str:
        """The program whose peak is the largest."""
        return max(self.programs, key=self.peak)

    def fits(self, chip: Chip) -> bool:
        """Whether every program fits into the memory of a chip."""
        exceeded = any(program.exceeded for program in self.programs.values())
        return not exceeded and self.peak(self.largest) <= chip.memory


def make_report(
    config: ml_collections.ConfigDict,
    machine: Machine,
    fine_tuning: bool = False,
    expected: Expected | None = None,
    programs: Collection[str] = (),
) -> Report:
    """Compiles (TPU) or lowers (CUDA) the programs of a run, and reads what they need.

    Args:
      config: the configuration of the run.
      machine: the machine, which does not have to be there.
      fine_tuning: whether the programs are those of `spg_jax.pretrain` from the checkpoint.
      expected: of the rollouts of the run; None expects that nothing can be saved.
      programs: names of the programs to compile, of `Plan.programs`; none stands for all.

    Raises:
      ValueError: if the mesh does not divide the machine, the model or the rows.
    """
    # For CUDA nothing is compiled, so CPU devices can take the place of GPUs.
    devices = machine.devices or jax.devices('cpu')[: machine.count]
    mesh = sharding.make_mesh(config.mesh, devices)
    check_mesh(config, assemble(config), mesh)
    plan = make_plan(config, mesh, machine.chip.platform, fine_tuning)
    measure = _compiled if machine.chip.platform == 'tpu' else _lowered
    return Report(
        topology=machine.topology,
        mesh=dict(mesh.shape),
        attention=plan.attention,
        resident=memory.resident(plan.state),
        programs={name: measure(plan, name) for name in programs or plan.programs},
        left={} if fine_tuning else work_left(plan, expected or Expected()),
    )


def _compiled(plan: Plan, name: str) -> Program:
    started = time.monotonic()
    whole = name in ('update', 'arrival', FINE_TUNING)
    held_bytes = memory.local_bytes(plan.state if whole else plan.state.variables)
    try:
        program = compile_program(plan, name)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise ValueError(
                f'{name}: the compiler fails on mesh {dict(plan.mesh.shape)} with '
                f'{_first_line(error)!r}; use another mesh, or another version of libtpu'
            ) from None
        figures = {'compiled': None, 'exceeded': _first_line(error), 'code': 0, 'collectives': {}}
    else:
        stats = program.memory
        needed = stats.argument_size_in_bytes - held_bytes + stats.temp_size_in_bytes
        needed += stats.output_size_in_bytes - stats.alias_size_in_bytes
        figures = {
            'compiled': needed,
            'exceeded': '',
            'code': stats.generated_code_size_in_bytes,
            'collectives': {
                kind: tuple(traffic)
                for kind, traffic in collectives.read_traffic(program.text).items()
            },
        }
    return _program(plan, name, started, **figures)


def _lowered(plan: Plan, name: str) -> Program:
    started = time.monotonic()
    lower_for_cuda(plan, name)
    traffic = {'expected': (0, costs.expected_received(plan, name))}
    return _program(plan, name, started, compiled=None, exceeded='', code=0, collectives=traffic)


def _program(plan: Plan, name: str, started: float, **figures: Any) -> Program:
    work = costs.work(plan, name)
    return Program(
        flops=work.flops / plan.mesh.size,
        bytes=work.bytes / plan.mesh.size,
        estimated=memory.estimate(plan, name),
        seconds=time.monotonic() - started,
        **figures,
    )


def remedy(report: Report, config: ml_collections.ConfigDict, chip: Chip) -> str:
    """One line that says what to change in a run that does not fit."""
    exceeded = [name for name, program in report.programs.items() if program.exceeded]
    name = exceeded[0] if exceeded else report.largest
    needed = report.programs[name].exceeded or (
        f'{name} needs {report.peak(name) / GIB:.1f} GiB of the {chip.memory / GIB:.1f} GiB a '
        f'{chip.name} has'
    )
    parts = report.programs[name].estimated
    if name == FINE_TUNING:
        return f'{needed}: use {_remedy_of_fine_tuning(report, config, chip)}'
    if report.resident.total > 0.7 * chip.memory:
        return (
            f'{needed}; what stays is {report.resident.total / GIB:.1f} GiB of it: use a larger '
            'mesh.fsdp or mesh.tensor, or more chips'
        )
    largest = max(parts, key=parts.get)
    wider = 'a larger mesh.tensor' if largest in ('tables', 'attention', 'logits') else 'more chips'
    run = assemble(config)
    if name == 'evaluation':
        change = f'evaluation.batch below {config.evaluation.batch}, or {wider}'
    elif name == 'rollout':
        change = f'rl.generation_batch below {run.batching.rows_at_once}, or {wider}'
    elif not config.model.remat:
        change = 'model.remat=True'
    elif run.batching.draws_per_pass != 1 < run.objective.draws:
        change = 'rl.draws_per_pass=1'
    elif largest == 'gradients':
        change = 'a larger mesh.fsdp or mesh.tensor'
    else:
        change = f'rl.microbatch below {config.rl.microbatch}, or {wider}'
    return f'{needed}, most of it {largest}: use {change}'


def _remedy_of_fine_tuning(report: Report, config: ml_collections.ConfigDict, chip: Chip) -> str:
    """What to change in a fine-tuning that does not fit."""
    resident = report.resident
    if not config.lora.rank and resident.total + resident.weights > 0.7 * chip.memory:
        return (
            f'lora.rank above 0 and model.quantize=nf4, since what stays of all '
            f'parameters is {resident.total / GIB:.1f} GiB, or more chips'
        )
    if not config.model.quantize and config.lora.rank and resident.weights > 0.3 * chip.memory:
        return 'model.quantize=nf4, or more chips'
    if not config.model.remat:
        return 'model.remat=True'
    return f'base.batch_size below {config.base.batch_size}, or more chips'


@dataclasses.dataclass(frozen=True)
class Times:
    """How long a recipe takes at the assumed efficiency."""

    rollout: float  # seconds of a whole rollout, in however many parts it is generated
    update: float  # seconds of an update, or of a step of fine-tuning, which has no rollout
    hours: float  # hours of all rollouts and updates


def times(
    report: Report, config: ml_collections.ConfigDict, chip: Chip, efficiency: float
) -> Times:
    """How long a recipe takes without evaluations, and with the savings that are expected.

    Args:
      report: the figures of its programs.
      config: the configuration of the run.
      chip: the chip that the programs run on.
      efficiency: the share of the published rates that the programs reach.
    """
    seconds = {
        name: max(program.limits(chip).values()) / efficiency * report.left.get(name, 1.0)
        for name, program in report.programs.items()
    }
    steps = config.train.steps
    parts = assemble(config)
    if FINE_TUNING in seconds:
        step = seconds[FINE_TUNING]
        return Times(0.0, step, step * sum(stage.steps for stage in parts.stages) / 3600)
    rollouts = sum(collections_due(parts.objective, parts.batching, step) for step in range(steps))
    rollout = parts.batching.rows // parts.batching.rows_at_once * seconds['rollout']
    rollout += seconds.get('arrival', 0.0)
    total = rollouts * rollout + steps * seconds['update']
    return Times(rollout, seconds['update'], total / 3600)


def summary(
    report: Report, config: ml_collections.ConfigDict, machine: Machine, efficiency: float
) -> dict[str, Any]:
    """Everything in the table as JSON values: bytes, FLOPs and seconds on each chip."""
    chip = machine.chip
    return dataclasses.asdict(report) | {
        'task': config.task.name,
        'chips': machine.count,
        'memory': chip.memory,
        'peak': {name: report.peak(name) for name in report.programs},
        'fits': report.fits(chip),
        'limits': {name: program.limits(chip) for name, program in report.programs.items()},
        'efficiency': efficiency,
        'times': dataclasses.asdict(times(report, config, chip, efficiency)),
    }


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
