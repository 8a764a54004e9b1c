"""How far a run over images is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

__all__ = ["Counting", "clock", "pace"]

# Seconds between lines, and from the beginning to the first.
_SECONDS = 10.0


class Counting:
    """Counts images, and the windows within one, for who waits.

    On a terminal a bar with the number of images, the time of one and the time left. Elsewhere a
    line not more often than every ten seconds::

        12/40 images, 81 ms an image, 0:00:02 left
        12/40 images, window 30/77 of the next, 0:03:10 left

    The first image is left out of the pace where others follow: it prepares what they use; so are
    the others that run together with it. Threads may count at once.

    Args:
        total: images.
        desc: what the bar is called.
        tell: takes a line; None prints it to stderr.
        shown: False counts in silence.
        stream: where the bar goes; None is stderr.
        together: images that run together, so that they are done at once.
    """

    def __init__(
        self,
        total: int,
        desc: str = "",
        *,
        tell: Callable[[str], object] | None = None,
        shown: bool = True,
        stream: TextIO | None = None,
        together: int = 1,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self.total, self.done, self.shown = total, 0, shown
        self._tell = tell or (lambda text: print(text, file=stream, flush=True))
        self._together, self._lock = together, threading.RLock()
        self._began = self._told = self._last = time.monotonic()
        # After the first images, how many these were.
        self._paced: tuple[float, int] | None = None
        self._bar: tqdm | None = None
        if shown and stream.isatty():
            self._bar = tqdm(
                total=total,
                desc=desc or None,
                file=stream,
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Of one image, on average until the last that is done; 0 before one is done."""
        with self._lock:
            if self._paced is not None and self.done > self._paced[1]:
                since, first = self._paced
                return (self._last - since) / (self.done - first)
            return (self._last - self._began) / self.done if self.done else 0.0

    def add(self, images: int = 1) -> None:
        """Images that are done."""
        with self._lock:
            self.done += images
            self._last = time.monotonic()
            text = pace(self.seconds) + self._left(self.total - self.done)
            if self._paced is None and self.done >= self._together:
                self._paced = self._last, self.done
            if self._bar is not None:
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(images)
            elif self.done < self.total:
                self._line(text)

    def windows(self, done: int, total: int) -> None:
        """Windows that are done of the image that runs."""
        if total < 2 or not self.shown:
            return
        text = f"window {done}/{total}"
        with self._lock:
            if self._bar is not None:
                self._bar.set_postfix_str(text)
            elif done < total:
                left = self._left(self.total - self.done - done / total)
                self._line(f"{text} of the next{left}")

    def write(self, text: str, file: TextIO) -> None:
        """A line above the bar, or where there is none as it is."""
        with self._lock:
            if self._bar is not None:
                self._bar.write(text, file=file)
            else:
                print(text, file=file, flush=True)

    def _left(self, images: float) -> str:
        return f", {clock(images * self.seconds)} left" if self.done and images > 0 else ""

    def _line(self, text: str) -> None:
        if not self.shown or time.monotonic() - self._told < _SECONDS:
            return
        self._told = time.monotonic()
        self._tell(f"{self.done}/{self.total} images, {text}")


def pace(seconds: float) -> str:
    """The time of one image: 81.2 ms an image, 12.3 s an image."""
    if seconds >= 10:
        return f"{seconds:.1f} s an image"
    milliseconds = 1e3 * seconds
    return (
        f"{milliseconds:.3g} ms an image"
        if milliseconds < 100
        else f"{milliseconds:.0f} ms an image"
    )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:12:40."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
