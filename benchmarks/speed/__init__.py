"""The speed of rollout, update, pre-training step and start; `__main__` says how to run it."""
