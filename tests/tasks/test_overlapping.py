"""Work beside the main work: in order, bounded, with its errors, and nothing lost."""

import threading

import pytest

from tasks.overlapping import read_ahead, taken_ahead, write_behind


def test_items_come_in_order_and_one_is_read_ahead():
    begun = []
    second = threading.Event()

    def read(item):
        begun.append(item)
        if item == 1:
            second.set()
        return item * 10

    reading = read_ahead(range(5), read)
    assert next(reading) == 0
    assert second.wait(10)  # the next one is read while this one is used
    assert max(begun) == 1
    assert list(reading) == [10, 20, 30, 40]
    assert begun == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_and_one_item_are_read_and_written(count):
    assert list(read_ahead(range(count), str)) == ["0"] * count
    assert list(write_behind(range(count), str)) == ["0"] * count


def test_without_threads_each_item_is_read_and_written_in_its_turn():
    begun = []
    caller = threading.get_ident()

    def noted(what):
        def note(item):
            assert threading.get_ident() == caller
            begun.append((what, item))
            return item

        return note

    reading = read_ahead(range(2), noted("read"), threads=0)
    assert list(write_behind(reading, noted("write"), threads=0)) == [0, 1]
    assert begun == [("read", 0), ("write", 0), ("read", 1), ("write", 1)]


def test_an_error_of_reading_is_raised_where_its_item_is_due():
    def read(item):
        if item == 2:
            raise OSError("item 2")
        return item

    reading = read_ahead(range(4), read)
    assert [next(reading), next(reading)] == [0, 1]
    with pytest.raises(OSError, match="item 2"):
        next(reading)


def test_one_item_is_written_while_the_next_is_made():
    made_second = threading.Event()
    written = []

    def make():
        yield 0
        made_second.set()
        yield 1

    def write(item):
        assert made_second.wait(10)  # would wait for ever if writing held up making
        written.append(item)
        return item

    assert list(write_behind(make(), write)) == [0, 1]
    assert written == [0, 1]


def test_at_most_one_item_waits_to_be_written():
    made, written = [], []

    def make():
        for item in range(6):
            assert len(made) - len(written) <= 1
            made.append(item)
            yield item

    for item in write_behind(make(), lambda item: written.append(item) or item):
        assert item in written
    assert written == made


def test_an_error_of_writing_is_raised_before_another_item_is_taken():
    taken, release = [], threading.Event()

    def make():
        for item in range(5):
            taken.append(item)
            if item == 1:
                release.set()
            yield item

    def write(item):
        assert release.wait(10)
        raise OSError(f"disk full at {item}")

    with pytest.raises(OSError, match="disk full at 0"):
        list(write_behind(make(), write))
    assert taken == [0, 1]


def test_an_error_of_the_last_write_is_raised():
    def write(item):
        if item == 2:
            raise OSError("disk full at 2")
        return item

    with pytest.raises(OSError, match="disk full at 2"):
        list(write_behind(range(3), write))


@pytest.mark.parametrize("how", ["closed", "failed"])
def test_what_was_made_is_written_though_the_rest_is_not_wanted_or_fails(how):
    written, release = [], threading.Event()

    def make():
        yield "a"
        yield "b"
        release.set()
        raise ValueError("c cannot be made")

    def write(item):
        if item == "b" and how == "failed":
            assert release.wait(10)
        written.append(item)
        return item

    writing = write_behind(make(), write)
    assert next(writing) == "a"
    if how == "closed":
        writing.close()
    else:
        with pytest.raises(ValueError, match="c cannot be made"):
            next(writing)
    assert written[0] == "a"
    assert how == "closed" or written == ["a", "b"]


def test_as_many_items_are_read_ahead_as_there_are_threads():
    begun, all_three = [], threading.Barrier(3, timeout=10)

    def read(item):
        begun.append(item)
        if item in (1, 2, 3):
            all_three.wait()  # would break if fewer were read at a time
        return item

    reading = read_ahead(range(6), read, threads=3)
    assert [next(reading), next(reading)] == [0, 1]
    assert max(begun) <= 4  # the one in use, and three ahead
    assert list(reading) == [2, 3, 4, 5]


def test_as_many_items_are_written_behind_as_there_are_threads():
    made, written, together = [], [], threading.Barrier(3, timeout=10)

    def make():
        for item in range(6):
            assert len(made) - len(written) <= 3
            made.append(item)
            yield item

    def write(item):
        together.wait()  # would break if fewer were written at a time
        written.append(item)
        return item

    assert list(write_behind(make(), write, threads=3)) == list(range(6))


def test_an_error_of_one_of_several_writers_is_raised_and_the_others_finish():
    taken, written, release = [], [], threading.Event()

    def make():
        for item in range(9):
            taken.append(item)
            if item == 3:
                release.set()
            yield item

    def write(item):
        assert release.wait(10)
        if item == 0:
            raise OSError("disk full at 0")
        written.append(item)

    with pytest.raises(OSError, match="disk full at 0"):
        list(write_behind(make(), write, threads=3))
    assert taken == [0, 1, 2, 3]
    assert sorted(written) == [1, 2]


def test_the_next_item_is_taken_while_one_is_used():
    taken = []
    second = threading.Event()

    def items():
        for item in range(3):
            taken.append((item, threading.current_thread().name))
            if item == 1:
                second.set()
            yield item

    ahead = taken_ahead(items())
    assert next(ahead) == 0
    assert second.wait(10), "taken before it is asked for"
    assert list(ahead) == [1, 2]
    assert [item for item, _ in taken] == [0, 1, 2]
    assert {name for _, name in taken} == {"read-ahead_0"}


def test_an_error_of_taking_is_raised_where_its_item_is_due():
    def items():
        yield 0
        raise OSError("gone")

    ahead = taken_ahead(items())
    assert next(ahead) == 0
    with pytest.raises(OSError, match="gone"):
        next(ahead)
