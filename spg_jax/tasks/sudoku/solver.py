"""Solves a Sudoku of 4 x 4 as a person does: one cell after another, with a reason for each."""

from collections.abc import Iterator

SIDE = 4
_ROWS = tuple(tuple(range(SIDE * i, SIDE * i + SIDE)) for i in range(SIDE))
_COLUMNS = tuple(tuple(range(i, SIDE * SIDE, SIDE)) for i in range(SIDE))
_BOXES = tuple(tuple(corner + step for step in (0, 1, 4, 5)) for corner in (0, 2, 8, 10))
UNITS = (
    *((f'row {place}', cells) for place, cells in enumerate(_ROWS, 1)),
    *((f'column {place}', cells) for place, cells in enumerate(_COLUMNS, 1)),
    *(
        (f'the {name} box', cells)
        for name, cells in zip(
            ('upper left', 'upper right', 'lower left', 'lower right'), _BOXES, strict=True
        )
    ),
)


def work_out(puzzle: str) -> tuple[str, str]:
    """Returns (the reasoning with one line a step, the full grid of 16 digits).

    Args:
      puzzle: 16 digits in reading order, 0 where empty.

    Raises:
      ValueError: the puzzle reaches a point where no single step determines another cell.
    """
    grid = list(puzzle)
    lines = [_rows('I write the puzzle as rows', grid)]
    while '0' in grid:
        step = next(_steps(grid), None)
        if step is None:
            raise ValueError(f'no single step goes on from {"".join(grid)}; try another puzzle')
        cell, digit, reason = step
        grid[cell] = digit
        lines.append(f'{reason}: row {cell // SIDE + 1}, column {cell % SIDE + 1} is {digit}.')
    lines.append(_rows('Every cell is filled', grid))
    return '\n'.join(lines), ''.join(grid)


def _steps(grid: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yields (cell, digit, reason) for every cell a step determines, the plainest reasons first."""
    allowed = {cell: _allowed(grid, cell) for cell, digit in enumerate(grid) if digit == '0'}
    for name, cells in UNITS:
        empty = [cell for cell in cells if cell in allowed]
        if len(empty) == 1 and len(allowed[empty[0]]) == 1:
            yield empty[0], *allowed[empty[0]], f'{_capital(name)} lacks one digit'
    for cell, digits in allowed.items():
        if len(digits) == 1:
            others = ', '.join(digit for digit in '1234' if digit not in digits)
            yield cell, *digits, f'Its row, column and box hold {others}'
    for name, cells in UNITS:
        for digit in '1234':
            places = [cell for cell in cells if digit in allowed.get(cell, ())]
            if len(places) == 1:
                yield places[0], digit, f'{_capital(name)} has one place left for {digit}'


def _allowed(grid: list[str], cell: int) -> tuple[str, ...]:
    """Returns the digits that are not yet in the row, column or box of an empty cell."""
    held = {grid[peer] for _, cells in UNITS if cell in cells for peer in cells}
    return tuple(digit for digit in '1234' if digit not in held)


def _rows(opening: str, grid: list[str]) -> str:
    text = ''.join(grid)
    return f'{opening}: {", ".join(text[row : row + SIDE] for row in range(0, len(text), SIDE))}.'


def _capital(name: str) -> str:
    return name[0].upper() + name[1:]
