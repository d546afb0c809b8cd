"""Every verdict of the published scorers on real completions, reproduced."""

from spg_jax import score


def test_every_published_verdict(reference):
    result = score.verify(str(reference / 'data' / 'llada_generations.jsonl'))
    assert (result['disagreements'], result['checked'], result['skipped']) == (0, 1012, 0)
    found = {figures['task']: (figures['correct'], figures['total']) for figures in result['tasks']}
    assert found == {
        'countdown': (53, 256),
        'gsm8k': (211, 300),
        'math500': (54, 200),
        'sudoku': (240, 2048),
    }
