"""GSM8K: word problems of primary school, each with a number for an answer (arXiv 2110.14168)."""

from spg_jax.tasks.gsm8k.task import GSM8K

__all__ = ['GSM8K']
