"""Rows of examples against the same rows written by hand."""

import numpy as np

from spg_jax.data.demonstrations import Demonstrations
from spg_jax.data.sequences import pack

EOS, PAD = 1, 2


def test_examples_begin_where_blocks_do_and_end_with_eos():
    prompt = np.array([[PAD, 5, 6], [7, 8, 9]])
    batch = Demonstrations(
        prompt=prompt,
        prompt_mask=prompt != PAD,
        completion=np.array([[11, EOS, EOS], [12, 13, EOS]]),
        index=np.array([4, 9], np.uint32),
    )
    rows = pack(batch, documents=2, length=16, block=4, eos_id=EOS)
    # The first has 2 + 3 tokens and the second 3 + 3; both end with the second block.
    assert rows.tokens.tolist() == [
        [5, 6, 11, EOS, EOS, EOS, EOS, EOS, 7, 8, 9, 12, 13, EOS, EOS, EOS]
    ]
    assert rows.maskable.tolist() == [[False] * 2 + [True] * 6 + [False] * 3 + [True] * 5]
    assert rows.valid.all()
    assert rows.document.tolist() == [[0] * 8 + [1] * 8]
    assert rows.index.tolist() == [4]
    # Without blocks nothing follows the C tokens, and one example a row needs no documents.
    alone = pack(batch, documents=1, length=8, block=1, eos_id=EOS)
    assert alone.document is None and alone.index.tolist() == [4, 9]
    assert alone.valid.sum(1).tolist() == [5, 6]
    assert alone.maskable.sum(1).tolist() == [3, 3]
