"""Reinforcement learning of masked diffusion policies: rollout, objectives, learner, evaluator."""
