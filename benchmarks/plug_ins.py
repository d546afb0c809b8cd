"""Which method admits which plug-in, as a table that goes into docs/own_method.md.

    python -m benchmarks.plug_ins            # prints the table and the reasons
    python -m benchmarks.plug_ins --write    # puts them into the page

Every method is assembled with its published settings and each plug-in by itself, and a refusal is
what the configuration says.
"""

import re
import sys
from pathlib import Path
from typing import Any

import ml_collections

from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.method import use_recipe
from spg_jax.rl.objectives import REGISTRY

PAGE = Path(__file__).parent.parent / 'docs' / 'own_method.md'
EXAMPLE = 'examples.own_objective'
PLUG_INS = (
    ('rl.advantage', 'centred'),
    ('rl.advantage', 'leave_one_out'),
    ('rl.advantage', 'standardised'),
    ('rl.advantage', 'raw'),
    ('rl.kl', 0.1),
    ('rl.clip', 'ppo'),
    ('rl.clip', 'unconditional'),
    ('corruption.complementary', True),
)
# What some methods need of the sampler beside their recipes.
NEEDS = {'just_grpo': {'sampling.steps': 256}}


def config_of(name: str, **changes: Any) -> ml_collections.ConfigDict:
    """The default configuration with a method and its recipe.

    Args:
      name: of a method.
      changes: values of settings by GROUP.KEY.
    """
    config = default_config(name)
    config.rl.recipe = 'published'
    use_recipe(config)
    for key, value in (NEEDS.get(name, {}) | changes).items():
        group, leaf = key.split('.')
        config[group][leaf] = value
    return config


def refusal(name: str, key: str, value: Any, **changes: Any) -> str | None:
    """What is said against a plug-in for a method; None if it is admitted."""
    assemble(config_of(name, **changes))  # It must not be anything else that is refused.
    try:
        assemble(config_of(name, **changes, **{key: value}))
    except ValueError as error:
        return str(error)
    return None


def table() -> str:
    """The table in Markdown, and under it the reasons."""
    keys = list(dict.fromkeys(key for key, _ in PLUG_INS))
    head = f'| method | {" | ".join(f"`{key}`" for key in keys)} |'
    rows, reasons = [head, '|---' * (len(keys) + 1) + '|'], {}
    for name in (*sorted(REGISTRY), EXAMPLE):
        cells = []
        for key in keys:
            values = [value for other, value in PLUG_INS if other == key]
            messages = {value: refusal(name, key, value) for value in values}
            refused = [str(value) for value in values if messages[value]]
            which = key if len(refused) == len(values) else f'{key}={", ".join(refused)}'
            for message in filter(None, messages.values()):
                reason = message.partition(f'{name!r}: ')[2]
                reasons.setdefault((which, reason), {})[name] = None
            partly = f'all but {", ".join(refused)}' if refused else 'yes'
            cells.append('–' if len(refused) == len(values) else partly)
        rows.append(f'| {name} | {" | ".join(cells)} |')
    lines = [
        f'- `{which}`, {", ".join(names)}: {reason}.' for (which, reason), names in reasons.items()
    ]
    return '\n'.join([*rows, '', 'Why not:', '', *sorted(lines)])


def with_table(page: str) -> str:
    """A page whose table of plug-ins is the present one."""
    return re.sub(
        r'\| method \| `rl.advantage`.*?(?=\n\n## )', lambda _: table(), page, flags=re.DOTALL
    )


if __name__ == '__main__':
    print(table())
    if '--write' in sys.argv[1:]:
        PAGE.write_text(with_table(PAGE.read_text()))
