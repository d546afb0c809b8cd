"""What a run leaves on disk: its directory, policies, checkpoints, metrics and plots."""
