"""Tasks: prompts, rewards, scores, demonstrations and problems. Nothing here needs JAX or a model.

Builders of problems and tasks import `problems` modules, and a task imports its builder lazily. No
module in this package imports the package itself, so that imports never run in a circle.
"""

from spg_jax.errors import check_one_of
from spg_jax.tasks import reading
from spg_jax.tasks.countdown import Countdown
from spg_jax.tasks.gsm8k import GSM8K
from spg_jax.tasks.math500 import Math500
from spg_jax.tasks.sudoku import Sudoku
from spg_jax.tasks.task import EXAMPLES, RULES, Example, Score, Task, fill, read_template

__all__ = ['Example', 'Score', 'TASKS', 'Task', 'get']

TASKS: dict[str, type[Task]] = {task.name: task for task in (Countdown, GSM8K, Math500, Sudoku)}


def get(
    name: str,
    format: str = 'compact',
    prompt_template: str = '',
    shots: int = 0,
    rules: str = 'released',
    fields: str = '',
) -> Task:
    """Returns the task `name` in a format; call this instead of the constructor of a Task.

    Args:
      name: a key of TASKS.
      format: 'compact' (small models), or the published instructions as 'published_train' or
        'published_eval'.
      prompt_template: a file with another wording of the prompt; '' is the built-in wording.
      shots: the number of worked examples in the prompt, at most as many as the format has.
      rules: the rules of reward and score: 'released', or 'mended', which common sense shares.
      fields: the user's own keys in given files, as NAME:KEY pairs with commas between them.

    Raises:
      ValueError: name, format, rules or a name in fields are unknown, the format has fewer
        examples than `shots`, or the template cannot be used; the message lists the known values.
    """
    check_one_of('task', name, sorted(TASKS))
    task = TASKS[name]
    check_one_of(f'format of task {name}', format, task.formats)
    check_one_of(f'task.rules of {name}', rules, RULES)
    examples = task.formats[format].examples
    if shots not in range(len(examples) + 1):
        limit = f'has examples for 0 to {len(examples)}' if examples else 'has no worked examples'
        raise ValueError(f'task.shots is {shots}; format {format} of task {name} {limit}')
    if prompt_template:
        # With shots, the file must say where in the prompt the worked examples stand.
        required = (*task.placeholders, EXAMPLES) if shots else task.placeholders
        optional = (EXAMPLES,) if examples else ()
        template = read_template(prompt_template, required, optional)
    else:
        template = task.formats[format].template
    reading.with_own_keys(task.usual_columns, fields)  # Fail early: files are read much later.
    return task(format, fill(template, {EXAMPLES: ''.join(examples[:shots])}), rules, fields)
