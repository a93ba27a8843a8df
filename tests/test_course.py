"""Steps, segments and tokens of a run whose batch changes."""

import random

from txl_jax.course import Course


def test_with_one_batch_all_follow_from_the_step():
    course = Course(64)
    assert [course.tokens(step) for step in (0, 1, 9)] == [0, 64, 576]
    assert [course.segment(step) for step in (0, 1, 9)] == [0, 1, 9]
    assert [course.steps(tokens) for tokens in (1, 64, 65, 576)] == [1, 1, 2, 9]
    assert Course.after(64, 9, 576) == course


def test_whatever_the_batches_every_token_is_counted_once():
    draw = random.Random(0)
    for _ in range(100):
        step = tokens = 0
        course = Course(draw.randrange(1, 200))
        for _ in range(10):
            end = tokens + draw.randrange(1, 2000)
            last = course.steps(end)
            for _ in range(draw.randrange(20)):
                assert course.tokens(step) == tokens
                # The segment is the one that begins at the newest token seen, or before it.
                assert 0 <= tokens - course.segment(step) * course.step_tokens < course.step_tokens
                assert (step >= last) == (tokens >= end)
                step, tokens = step + 1, tokens + course.step_tokens
            # A process that starts again with the same batch computes the same.
            assert Course.after(course.step_tokens, step, tokens) == course
            course = Course.after(draw.randrange(1, 200), step, tokens)
