"""What `spg_jax.train --explain` prints: every setting in force, and where its value comes from."""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from typing import NamedTuple

import ml_collections
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spg_jax import config as table_of_settings
from spg_jax.limits import check_settings
from spg_jax.method import FAST, SPG, alias_names
from spg_jax.process.config_flag import Sources
from spg_jax.rl.objectives import find, group_of

# What the marks at the end of comments in `default_config` stand for.
MARKS = 'published numbers: [A] appendix of the paper, [S] [C] [E] files of the released code'
WIDE = 500  # columns where no terminal sets a width, so that every setting has one line


class Setting(NamedTuple):
    """A setting in force."""

    key: str  # GROUP.KEY
    value: str
    source: str  # command line, recipe, preset or default
    meaning: str


def explain(config: ml_collections.ConfigDict, sources: Sources) -> list[Setting]:
    """Every setting of a configuration, group by group.

    SPG's other names `rl.KEY` are left out. A value that a preset sets to the default counts as the
    default.
    """
    meanings = meanings_of(config.rl.objective)
    defaults = table_of_settings.default_config(config.rl.objective)
    aliases = set(alias_names()) if config.rl.objective == SPG else set()
    overridden = {
        key.replace('rl.', f'{SPG}.') if key in {f'rl.{name}' for name in aliases} else key
        for key in sources.overridden
    }
    rows = []
    for group, settings in config.items():
        for name, value in settings.items():
            key = f'{group}.{name}'
            if group == 'rl' and name in aliases:
                continue
            meaning, _, mark = meanings[key].partition(' [')
            if {key, group} & overridden:
                source = 'command line'
            elif key in sources.completed:
                source = 'sampling.preset' if key in FAST and config.sampling.preset else 'recipe'
            elif value != defaults[group][name]:
                source = 'preset'
            else:
                source = f'default [{mark}' if mark else 'default'
            rows.append(Setting(key, str(value) if value != '' else "''", source, meaning))
    return rows


def meanings_of(objective: str) -> dict[str, str]:
    """The meaning of each setting by GROUP.KEY.

    Those of the table in `spg_jax.config` are the comments beside them, and those of an objective
    are the second arguments of `setting`.
    """
    source = inspect.getsource(table_of_settings)
    comments = {
        token.start[0]: token.string.removeprefix('#').strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    meanings = {
        f'{group.arg}.{leaf.arg}': comments.get(leaf.value.end_lineno, '')
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        for group in call.keywords
        if isinstance(group.value, ast.Call)
        for leaf in group.value.keywords
    }
    for field in dataclasses.fields(find(objective).settings):
        meanings[f'{group_of(objective)}.{field.name}'] = field.metadata.get('meaning', '')
    return meanings


def print_explanation(config: ml_collections.ConfigDict, sources: Sources) -> None:
    """Prints `explain` as a table; without a terminal every setting has one line.

    Raises:
      ValueError: a setting does not exist or has a value of another kind or range.
    """
    check_settings(config)
    table = Table('setting', 'value', 'from', 'meaning', box=None, pad_edge=False)
    group = ''
    for row in explain(config, sources):
        if group not in ('', row.key.partition('.')[0]):
            table.add_row()
        group = row.key.partition('.')[0]
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    with console.capture() as capture:
        console.print(table)
    print(f'{sources.file}, recipe {config.rl.recipe}; {MARKS}\n')
    print(re.sub(r' +$', '', capture.get(), flags=re.MULTILINE), end='')
