"""The tokens of a long text to windows, each of which becomes a chunk.

`tokens`: every window is full, and repeats exactly `overlap` tokens of the one before. `sentence`: windows are of about
equal length, so that the last is no sliver, and end at the best border in reach of that length: a paragraph's end, or
else a sentence's, a line's, a word's. An overlap begins at the best border too, so it has `overlap` to `overlap` +
reach tokens. The reach is an eighth of the tokens by which a window can go on from the one before.

No window ends inside a character as long as one fits: a cut that would is moved to the nearest border of characters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3cli.config import Split
from m3cli.encoder.borders import Border
from m3cli.errors import UsageError

REACH_PART = 8
"of the tokens that a window can have beyond its overlap, the part that a border is looked for in, to either side"


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, stop) of a text, of which the first `repeated` are in the window before too."""

    start: int
    stop: int
    repeated: int


def cut_windows(levels: NDArray[np.uint8], *, size: int, overlap: int, split: Split) -> list[Window]:
    """Cut T tokens, given how good the border before each is [T], into windows of at most `size`; at least one.

    Raises:
        UsageError: `size` leaves no token beyond the overlap.
    """
    if size <= overlap:
        raise UsageError(
            f"--overlap {overlap} and --prefix leave no room: a chunk holds {max(size, 0)} tokens of text; "
            "lower --overlap, shorten --prefix or raise --max-length"
        )
    reach = (size - overlap) // REACH_PART if split == "sentence" else 0
    windows: list[Window] = []
    start = covered = 0
    while len(levels) - start > size:
        room, target = size - (covered - start), 0
        if split == "sentence":
            ahead = overlap if covered == 0 else 0  # of the first window, which the second is to repeat
            left = len(levels) - covered - ahead
            target = ahead + -(-left // -(-left // (size - overlap - reach)))
        stop = _choose_stop(levels, covered, room=room, target=min(target, room) or room, reach=reach)
        windows.append(Window(start, stop, covered - start))
        start, covered = _choose_start(levels, start, stop, overlap=overlap, reach=reach, size=size), stop
    return [*windows, Window(start, len(levels), covered - start)]


def _choose_stop(levels: NDArray[np.uint8], covered: int, *, room: int, target: int, reach: int) -> int:
    low, high = covered + max(1, target - reach), covered + min(room, target + reach)
    stop = _find_best(levels, low, high, near=covered + target)
    if levels[stop] > Border.GRAPHEME:
        return stop
    return _find_nearest(levels, covered + 1, covered + room, near=covered + target)


def _choose_start(levels: NDArray[np.uint8], before: int, stop: int, *, overlap: int, reach: int, size: int) -> int:
    """Return where the window after [before, stop) begins."""
    if overlap == 0:
        return stop
    high = max(before + 1, stop - overlap)
    start = _find_best(levels, max(before + 1, high - reach), high, near=high)
    if levels[start] > Border.GRAPHEME:
        return start
    # At least half of what a window has beyond its overlap stays free for new tokens.
    return _find_nearest(levels, max(before + 1, high - (size - overlap) // 2), stop, near=high)


def _find_best(levels: NDArray[np.uint8], low: int, high: int, *, near: int) -> int:
    """Return the best border in [low, high], and of equal ones the nearest to `near`."""
    found = levels[low : high + 1]
    best = np.flatnonzero(found == found.max()) + low
    return int(best[np.argmin(np.abs(best - near))])


def _find_nearest(levels: NDArray[np.uint8], low: int, high: int, *, near: int) -> int:
    """Return the border between characters in [low, high] nearest to `near`, or else one inside a grapheme."""
    found = levels[low : high + 1]
    for least in (Border.INSIDE_WORD, Border.GRAPHEME):
        places = np.flatnonzero(found >= least) + low
        if len(places):
            return int(places[np.argmin(np.abs(places - near))])
    return near
