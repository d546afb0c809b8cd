"""What a run needs of a machine it has not been given yet: memory, arithmetic, traffic, time."""
