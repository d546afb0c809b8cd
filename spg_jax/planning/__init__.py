"""What a run would need of a machine that is not there: memory, arithmetic, traffic and time."""
