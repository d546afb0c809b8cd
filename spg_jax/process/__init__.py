"""How the process lives: flags, several processes, interruption, progress, libtpu."""
