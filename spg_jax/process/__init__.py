"""The life of a process: flags, several processes, files, interruption, progress and libtpu."""
