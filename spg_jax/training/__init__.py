"""What both trainings share: the train state and the optimisers."""
