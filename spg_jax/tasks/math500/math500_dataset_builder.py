"""The MATH problems as a TFDS dataset, as PRM800K splits them (MIT licence).

MATH500 is the test set of that split.
"""

from spg_jax.tasks.math500 import problems
from spg_jax.tasks.published_files import PublishedBuilder

_ROOT = 'https://github.com/openai/prm800k/raw/main/prm800k/math_splits'


class Builder(PublishedBuilder):
    """The 12,000 other problems of MATH to learn from, 256 of them for validation, and MATH500."""

    URLS = {split: f'{_ROOT}/{split}.jsonl' for split in ('train', 'test')}
    read_published = staticmethod(problems.read_published)
    columns = problems.COLUMNS
