"""Counts the lines of code of every objective, and writes them into docs/own_method.md.

    python -m benchmarks.objective_lines            # prints the table
    python -m benchmarks.objective_lines --write    # puts it into the page

Docstrings, comments and empty lines do not count.
"""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / 'docs' / 'own_method.md'
FOLDER = REPOSITORY / 'spg_jax' / 'rl' / 'objectives'
EXAMPLE = REPOSITORY / 'examples' / 'own_objective.py'
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
LAYOUT |= {tokenize.ENDMARKER}


def lines_of_code(source: str) -> int:
    """The number of lines that hold code; every line of a longer statement counts."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
    ]
    words = {line for text in docstrings for line in range(text.lineno, text.end_lineno + 1)}
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in LAYOUT
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - words)


def table() -> str:
    """The table in Markdown: objectives by their length, and their first lines."""
    rows = []
    for path in [*FOLDER.glob('*.py'), EXAMPLE]:
        source = path.read_text()
        if re.search(r'^def build\(', source, re.MULTILINE):
            title = ast.get_docstring(ast.parse(source)).splitlines()[0].rstrip('.')
            file = path.relative_to(REPOSITORY)
            rows.append((lines_of_code(source), f'[{path.stem}](../{file})', title))
    head = ['| objective | lines of code | what it is |', '|---|---|---|']
    return '\n'.join([*head, *(f'| {name} | {n} | {title} |' for n, name, title in sorted(rows))])


def with_table(page: str) -> str:
    """A page whose table of objectives is the present one."""
    return re.sub(r'\| objective \| lines of code.*(\n\|.*)*', lambda _: table(), page)


if __name__ == '__main__':
    print(table())
    if '--write' in sys.argv[1:]:
        PAGE.write_text(with_table(PAGE.read_text()))
