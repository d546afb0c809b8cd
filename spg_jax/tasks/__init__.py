"""Tasks: prompts, rewards, scores, demonstrations and problems. Nothing here needs JAX or a model.

Builders of problems and tasks import `problems` modules, and a task imports its builder lazily. No
module in this package imports the package itself, so that imports never run in a circle.
"""

from spg_jax.tasks import modules
from spg_jax.tasks.countdown import Countdown
from spg_jax.tasks.gsm8k import GSM8K
from spg_jax.tasks.math500 import Math500
from spg_jax.tasks.source import Example
from spg_jax.tasks.sudoku import Sudoku
from spg_jax.tasks.task import Score, Task

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
      name: a key of TASKS, or the dotted path of a module with a task of the user, which has one
        wording and one set of rules.
      format: 'compact' (small models), 'worked' (with the steps of Countdown), or the published
        instructions as 'published_train' or 'published_eval'.
      prompt_template: a file with another wording of the prompt; '' is the built-in wording.
      shots: the number of worked examples in the prompt, at most as many as the format has.
      rules: the rules of reward and score: 'released', or 'mended', which common sense shares.
      fields: the user's own keys in given files, as NAME:KEY pairs with commas between them.

    Raises:
      ValueError: name, format, rules or a name in fields are unknown, the format has fewer
        examples than `shots`, or the template cannot be used; the message lists the known values.
    """
    kind = TASKS[name] if name in TASKS else modules.load(name, sorted(TASKS))
    return kind.with_settings(format, prompt_template, shots, rules, fields)
