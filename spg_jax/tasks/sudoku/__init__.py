"""Sudoku of 4 x 4: fill the empty cells so that every row, column and box of 2 x 2 holds 1 to 4."""

from spg_jax.tasks.sudoku.task import Sudoku

__all__ = ['Sudoku']
