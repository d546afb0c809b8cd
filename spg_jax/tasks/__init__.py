"""Tasks: prompts, rewards, scores, demonstrations and problems. No model in here, and no JAX."""

from spg_jax.tasks.countdown import Countdown
from spg_jax.tasks.gsm8k import GSM8K
from spg_jax.tasks.math500 import Math500
from spg_jax.tasks.sudoku import Sudoku
from spg_jax.tasks.task import EXAMPLES, Example, Score, Task, fill, read_template

__all__ = ['Example', 'Score', 'TASKS', 'Task', 'get']

TASKS: dict[str, type[Task]] = {task.name: task for task in (Countdown, GSM8K, Math500, Sudoku)}


def get(
    name: str,
    format: str = 'compact',
    prompt_template: str = '',
    shots: int = 0,
    rules: str = 'released',
) -> Task:
    """Returns the task `name` in a format; the one way to make a Task.

    Args:
      name: a key of TASKS.
      format: 'compact' (small models), or the published instructions as 'published_train' or
        'published_eval'.
      prompt_template: file with other wording for the prompt; '' is the built-in wording.
      shots: worked examples in the prompt, at most as many as the format has.
      rules: of the reward, 'released' or, where those slip, 'mended'.

    Raises:
      ValueError: unknown name, format or rules, more examples than there are, or a template that
        cannot be used; says which are known.
    """
    if name not in TASKS:
        raise ValueError(f'unknown task {name!r}; known are {", ".join(sorted(TASKS))}')
    task = TASKS[name]
    if format not in task.formats:
        raise ValueError(
            f'unknown format {format!r} of task {name}; known are {", ".join(task.formats)}'
        )
    if rules not in task.known_rules:
        raise ValueError(
            f'task.rules is {rules!r}; task {name} knows {", ".join(task.known_rules)}'
        )
    examples = task.formats[format].examples
    if shots not in range(len(examples) + 1):
        has = f'has examples for 0 to {len(examples)}' if examples else 'has no worked examples'
        raise ValueError(f'task.shots is {shots}; format {format} of task {name} {has}')
    if prompt_template:
        shown = (EXAMPLES,) if shots else ()  # so the file has to say where
        optional = (EXAMPLES,) if examples else ()
        template = read_template(prompt_template, (*task.placeholders, *shown), optional)
    else:
        template = task.formats[format].template
    return task(format, fill(template, {EXAMPLES: ''.join(examples[:shots])}), rules)
