"""The mathematics of masked diffusion: corruption, likelihood bounds, sampling. No RL in it."""
