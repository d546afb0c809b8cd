"""Where the published files are, for tests that hold our stored hashes against them."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def reference():
    """The folder that holds data/, the published test sets and completions."""
    folder = os.environ.get('SPG_JAX_REFERENCE')
    if not folder:
        pytest.skip('set SPG_JAX_REFERENCE to the folder that holds data/ with the published files')
    return Path(folder)
