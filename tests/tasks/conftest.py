"""The folder of the published files, for tests that compare them with the hashes stored here."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def reference():
    """Returns the folder with data/, which holds the published test sets and completions."""
    folder = os.environ.get('SPG_JAX_REFERENCE')
    if not folder:
        pytest.skip('set SPG_JAX_REFERENCE to the folder that holds data/ with the published files')
    return Path(folder)
