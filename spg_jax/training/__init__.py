"""The train state and the optimisers, which pre-training and RL share."""
