"""How far a run over images is, told in lines or by a bar."""

import io

import pytest

from deeplab_fast.engine import counting as module
from deeplab_fast.engine.counting import Counting, clock, pace


@pytest.fixture
def now(monkeypatch):
    """A clock that the test turns."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_lines_at_intervals(now):
    lines = []
    counting = Counting(40, tell=lines.append, stream=io.StringIO())
    # The first image is slow, and not in the pace of the others.
    for seconds in (9.0, *[0.5] * 20):
        now[0] += seconds
        counting.add()
    # At 9 + 2 * 0.5 = 10 s, with 37 left of 0.5 s each, and 10 s later.
    assert lines == [
        "3/40 images, 500 ms an image, 0:00:18 left",
    ]
    now[0] += 10
    counting.add(19)
    assert counting.done == 40 and len(lines) == 1, "the end is told by the command"


def test_windows_of_one_image(now):
    lines = []
    counting = Counting(2, tell=lines.append, stream=io.StringIO())
    counting.windows(1, 4)
    now[0] += 10
    counting.windows(2, 4)
    # One image took 20 s: the whole second is left, and then half of it.
    now[0] += 10
    counting.add()
    now[0] += 10
    counting.windows(2, 4)
    counting.windows(4, 4)
    counting.windows(1, 1)
    assert lines == [
        "0/2 images, window 2/4 of the next",
        "1/2 images, 20.0 s an image, 0:00:20 left",
        "1/2 images, window 2/4 of the next, 0:00:10 left",
    ]


def test_images_that_run_together_first_are_not_in_the_pace(now):
    counting = Counting(12, shown=False, together=4)
    for seconds in (9.0, 0, 0, 0, 4.0, 0, 0, 0):
        now[0] += seconds
        counting.add()
    # Four in 4 s; time that passes until the pace is asked for is no image's.
    now[0] += 50
    assert counting.done == 8 and counting.seconds == 1.0


def test_a_bar_on_a_terminal(now):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream, lines = Terminal(), []
    with Counting(3, tell=lines.append, stream=stream) as counting:
        now[0] += 3
        counting.windows(3, 8)
        counting.add()
        counting.write("a line", stream)
    text = stream.getvalue()
    assert "0/3, window 3/8" in text and "1/3, 3000 ms an image, 0:00:06 left" in text
    assert "a line\n" in text and lines == []


def test_silence(now):
    lines = []
    counting = Counting(3, tell=lines.append, shown=False, stream=io.StringIO())
    now[0] += 99
    counting.add()
    counting.windows(1, 2)
    assert lines == [] and counting.seconds == 99


def test_pace():
    times = (0.0123456, 0.5, 12.34)
    assert [pace(seconds) for seconds in times] == [
        "12.3 ms an image",
        "500 ms an image",
        "12.3 s an image",
    ]


def test_clock():
    assert [clock(seconds) for seconds in (-1, 59.6, 3600 * 12 + 61)] == [
        "0:00:00",
        "0:01:00",
        "12:01:01",
    ]
