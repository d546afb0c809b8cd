"""Reinforcement learning of masked diffusion policies: advantages, objectives, rollout, learner."""
