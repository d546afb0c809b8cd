"""Our scorers reproduce every verdict of the published scorers on real completions."""

from spg_jax import score


def test_every_published_verdict(reference):
    result = score.verify(str(reference / 'data' / 'llada_generations.jsonl'))
    assert (result['disagreements'], result['checked'], result['skipped']) == (0, 1012, 0)
    totals = {task['task']: (task['correct'], task['total']) for task in result['tasks']}
    assert totals == {
        'countdown': (53, 256),
        'gsm8k': (211, 300),
        'math500': (54, 200),
        'sudoku': (240, 2048),
    }
