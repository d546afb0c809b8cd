"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader finds the old content or all of the new, whenever it looks.

    The content goes to a file beside `path`, reaches the disk, and then takes the name.

    Args:
      path: the file, in a directory that exists.
      content: text, which is written as UTF-8, or bytes.
    """
    unfinished = path.with_name(path.name + '.new')
    with unfinished.open('wb') as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
