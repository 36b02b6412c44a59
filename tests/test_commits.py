"""The contiguous prefix: what may be committed, and what must not."""

from broker_nb.portable.commits import Prefix


def rows(*offsets):
    return [(o,) for o in offsets]


def test_a_gap_stops_the_prefix_and_closing_it_moves_on():
    p = Prefix()
    p.deliver(rows(0, 1, 2, 3, 4))
    assert p.mark((0,))
    assert p.mark((1,))
    assert not p.mark((3,))
    assert p.position == (1, 0)
    assert p.first_open == (2,)
    assert p.waiting == 3
    assert p.mark((2,))
    assert p.position == (3, 0)


def test_holes_in_the_log_are_no_gaps():
    p = Prefix()
    p.deliver(rows(5, 9, 40))
    assert p.mark((5,))
    assert p.mark((9,))
    assert p.position == (9, 0)


def test_marking_through_never_moves_back():
    p = Prefix()
    p.deliver(rows(*range(10)))
    assert p.mark_to((6,))
    assert p.position == (6, 0)
    assert not p.mark_to((2,))
    assert not p.mark((3,))
    assert p.position == (6, 0)


def test_marking_twice_and_rewinding():
    p = Prefix()
    p.deliver(rows(1, 2, 3))
    assert p.mark((1,))
    assert not p.mark((1,))
    p.mark((3,))
    assert p.is_done((3,))
    assert p.rewind() == (2,)
    assert p.waiting == 0
    assert not p.is_done((3,))
    assert p.rewind() is None
