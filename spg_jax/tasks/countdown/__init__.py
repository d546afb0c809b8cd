"""Countdown: make the target from three numbers, each used once, with + - * / and brackets."""

from spg_jax.tasks.countdown.task import Countdown

__all__ = ['Countdown']
