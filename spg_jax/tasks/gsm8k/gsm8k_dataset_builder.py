"""The GSM8K problems as a TFDS dataset, from their authors' repository (MIT licence)."""

from spg_jax.tasks.gsm8k import problems
from spg_jax.tasks.published_files import PublishedBuilder

_ROOT = 'https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data'


class Builder(PublishedBuilder):
    """7,473 problems to learn from, 256 of them for validation, and the published test of 1,319."""

    URLS = {split: f'{_ROOT}/{split}.jsonl' for split in ('train', 'test')}
    read_published = staticmethod(problems.read_published)
    columns = problems.COLUMNS
