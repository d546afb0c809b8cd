"""Every verdict of the published scorers on real completions, reproduced."""

from spg_jax import score


def test_every_published_verdict(reference):
    result = score.verify(str(reference / 'data' / 'llada_generations.jsonl'))
    assert (result['disagreements'], result['checked'], result['skipped']) == (0, 512, 500)
    countdown, sudoku = result['tasks']
    assert (countdown['correct'], countdown['total']) == (53, 256)
    assert (sudoku['correct'], sudoku['total']) == (240, 2048)
