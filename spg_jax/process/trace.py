"""Shows how a completion was filled in, step by step."""

from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_trace(
    tokens: np.ndarray, commit_step: np.ndarray, text_of: Callable[[int], str], console: Console
) -> None:
    """Prints one line for each denoising step: the newest tokens in colour, masked ones as dots.

    Args:
      tokens: [C] int32, the completion.
      commit_step: [C] int32, the step at which each token was fixed; -1 after an early stop.
      text_of: returns the text of a token id.
      console: where to print.
    """
    table = Table('step', 'completion', show_edge=False)
    for step in range(commit_step.max() + 1):
        line = Text()
        for token, committed in zip(tokens.tolist(), commit_step.tolist(), strict=True):
            # Tokens that an early stop filled in have step -1: the policy never predicted them.
            visible = 0 <= committed <= step
            style = 'bold green' if committed == step else '' if visible else 'dim'
            text = text_of(token).replace('\n', '\\n') if visible else '·'
            line.append(f'{text} ', style=style)
        table.add_row(str(step), line)
    console.print(table)
