"""MATH: competition problems whose answers are formulas (arXiv 2103.03874), tested on MATH500."""

from spg_jax.tasks.math500.task import Math500

__all__ = ['Math500']
