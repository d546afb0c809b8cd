"""Tasks: prompts, rewards, scores, demonstrations and problems. No model in here, and no JAX."""

from spg_jax.tasks.countdown import Countdown
from spg_jax.tasks.sudoku import Sudoku
from spg_jax.tasks.task import Example, Score, Task, read_template

__all__ = ['Example', 'Score', 'TASKS', 'Task', 'get']

TASKS: dict[str, type[Task]] = {task.name: task for task in (Countdown, Sudoku)}


def get(name: str, format: str = 'compact', prompt_template: str = '') -> Task:
    """Returns the task `name` in a format; the one way to make a Task.

    Args:
      name: a key of TASKS.
      format: 'compact' (small models), or the published instructions as 'published_train' or
        'published_eval'.
      prompt_template: file with other wording for the prompt; '' is the built-in wording.

    Raises:
      ValueError: unknown name or format, or a template that cannot be used; says which are known.
    """
    if name not in TASKS:
        raise ValueError(f'unknown task {name!r}; known are {", ".join(sorted(TASKS))}')
    task = TASKS[name]
    if format not in task.formats:
        raise ValueError(
            f'unknown format {format!r} of task {name}; known are {", ".join(task.formats)}'
        )
    if prompt_template:
        template = read_template(prompt_template, task.placeholders)
    else:
        template = task.formats[format].template
    return task(format, template)
