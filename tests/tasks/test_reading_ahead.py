"""Parts made ahead: the ones that will be asked for, and the same whatever was guessed."""

import threading

import pytest

from tasks.reading_ahead import Position, ReadAhead


@pytest.fixture
def reader():
    """Make a ReadAhead over (position -> position) and the list of what it made, in order."""
    opened = []

    def make(depth=2):
        made, is_free = [], threading.Semaphore(0)

        def make_one(position):
            made.append(position)
            is_free.release()
            return position

        ahead = ReadAhead(make_one, depth, initializer=lambda: None)
        opened.append(ahead)
        return ahead, made, is_free

    yield make
    for ahead in opened:
        ahead.close()


def wait_for(is_free, count):
    for _ in range(count):
        assert is_free.acquire(timeout=10)


def test_the_next_steps_are_made_before_they_are_asked_for(reader):
    ahead, made, is_free = reader()
    assert ahead.get(Position(4, 0, 1)) == (4, 0, 1)
    wait_for(is_free, 3)
    assert made == [(4, 0, 1), (5, 0, 1), (6, 0, 1)]
    ahead.get(Position(5, 0, 1))
    wait_for(is_free, 1)
    assert made[3:] == [(7, 0, 1)]  # 5 and 6 are not made again


def test_parts_of_a_step_follow_each_other(reader):
    ahead, made, is_free = reader(depth=3)
    ahead.get(Position(0, 0, 2))
    wait_for(is_free, 4)
    assert made == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]


@pytest.mark.parametrize("parts", [[2], [2, 3], [0, 3]])
def test_the_parts_of_a_rank_are_learned(reader, parts):
    # A reader that always guesses the next part makes three of four parts for nothing.
    ahead, made, _ = reader(depth=2)
    wanted = [Position(step, part, 4) for step in range(12) for part in parts]
    assert [ahead.get(one) for one in wanted] == wanted
    ahead.close()
    wasted = [one for one in made if one.part not in parts]
    assert len(wasted) <= 4
    assert len(made) <= len(wanted) + 2 + len(wasted)


def test_going_back_and_forth_gives_what_was_asked_for(reader):
    ahead, _, _ = reader()
    for step in (7, 3, 0, 3, 5):
        assert ahead.get(Position(step, 0, 1)) == (step, 0, 1)


def test_an_error_comes_at_the_part_that_has_it():
    def make(position):
        if position.step == 2:
            raise ValueError("bad shard")
        return position

    ahead = ReadAhead(make, 2, initializer=lambda: None)
    ahead.get(Position(0, 0, 1))
    ahead.get(Position(1, 0, 1))
    with pytest.raises(ValueError, match="bad shard"):
        ahead.get(Position(2, 0, 1))
    ahead.close()
