"""Frame times from the timestamps of packets, repaired where those contradict each other.

A decoder needs packets in the order of their decoding times (dts), so a file holds them in that order whatever its
clock says. Ascending dts are trusted. Where they step back, there are two cases: a few packets have a wrong time, and
move into the gap between their neighbours; or the clock restarts, and all later packets move to where the part before
ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST_REORDERED = 17  # a frame is shown at most so many packets before or after its own: 16 references in H.264, HEVC
_MOST_TICKS = 1 << 60  # so that differences of timestamps fit in an int64
_MOST_RESTARTS = 1000  # more of them mean that there is no usable clock


class PacketMark(NamedTuple):
    """Times and flags of a packet, without its data, so that a long file fits in memory. Times are in ticks."""

    pts: int | None
    dts: int | None
    duration: int
    keyframe: bool
    discard: bool


@dataclass(frozen=True, eq=False)
class Clock:
    """The times at which frames are shown.

    Attributes:
        ticks: int64 `[frames]`, ascending, on the stream's clock.
        place: int64 `[packets]`, the frame of each packet.
        end: ticks at which the last frame ends; None where its packet states no duration.
        repairs: a sentence on each kind of repair; empty where the stream's own times are used.
    """

    ticks: np.ndarray
    place: np.ndarray
    end: int | None
    repairs: tuple[str, ...] = ()


def read_clock(marks: Sequence[PacketMark], ordered: bool, longest: float | None, second: float) -> Clock | None:
    """The clock of a stream, or None where too few packets have times, or too few times make sense.

    Args:
        marks: packets of shown frames in file order, at least one.
        ordered: whether a dts that steps back is a fault; edit lists of MP4 make it do so.
        longest: ticks a dts may step forward; None means any.
        second: ticks.
    """
    known = np.array([mark.pts is not None for mark in marks])
    if 2 * known.sum() <= len(marks):
        return None
    pts = _fill([mark.pts for mark in marks])
    dts = _fill([mark.dts for mark in marks]) if any(mark.dts is not None for mark in marks) else np.sort(pts)
    duration = np.array([mark.duration for mark in marks], dtype=np.int64)
    if known.all() and _is_sound(pts, dts, ordered, longest):
        order = np.argsort(pts)
        return Clock(pts[order], np.argsort(order), _end(pts, duration))
    return _Repair(pts, dts, duration, known, ordered, longest, second).clock()


def _fill(values: Sequence[int | None]) -> np.ndarray:
    """Ticks as int64: unknown ones are interpolated, and huge ones clipped so that differences fit."""
    known = np.array([value is not None for value in values])
    ticks = np.clip([value or 0 for value in values], -_MOST_TICKS, _MOST_TICKS).astype(np.int64)
    if not known.all():
        place = np.flatnonzero(known)
        # Relative to the first one, as timestamps may be too large for the precision of floats.
        origin = ticks[place[0]]
        lost = np.flatnonzero(~known)
        ticks[lost] = origin + np.rint(np.interp(lost, place, (ticks[place] - origin).astype(float))).astype(np.int64)
    return ticks


def _is_sound(pts: np.ndarray, dts: np.ndarray, ordered: bool, longest: float | None) -> bool:
    steps = np.diff(dts)
    if (ordered and ((steps < 0).any() or (pts < dts).any())) or (longest is not None and (steps > longest).any()):
        return False
    if longest is not None and _is_late(pts, dts, _typical(steps, longest)).any():
        return False
    order = np.argsort(pts, kind="stable")
    return bool((np.diff(pts[order]) > 0).all() and _displacement(order).max() <= MOST_REORDERED)


def _typical(steps: np.ndarray, longest: float) -> float:
    """Ticks from one packet to the next; 0 where there is none."""
    usable = steps[(steps > 0) & (steps <= longest)]
    return float(np.median(usable)) if len(usable) else 0.0


def _is_late(pts: np.ndarray, dts: np.ndarray, step: float) -> np.ndarray:
    """Mark frames that are shown later than reordering explains: after the packet `MOST_REORDERED` behind theirs."""
    behind = np.minimum(np.arange(len(dts)) + MOST_REORDERED, len(dts) - 1)
    return pts - np.median(pts - dts) > dts[behind] + MOST_REORDERED * step


def _displacement(order: np.ndarray) -> np.ndarray:
    """How many places each packet moves from file order to presentation order."""
    return np.abs(order - np.arange(len(order)))


def _end(pts: np.ndarray, duration: np.ndarray) -> int | None:
    last = int(pts.argmax())
    return int(pts[last] + duration[last]) if duration[last] > 0 else None


class _Repair:
    """The repair of one clock; arrays are in file order."""

    def __init__(
        self,
        pts: np.ndarray,
        dts: np.ndarray,
        duration: np.ndarray,
        known: np.ndarray,
        ordered: bool,
        longest: float | None,
        second: float,
    ) -> None:
        self.pts, self.dts, self.duration, self.second = pts.copy(), dts.copy(), duration, second
        self.ordered, self.longest = ordered, np.inf if longest is None else longest
        self.unplaced = ~known
        self.step = _typical(np.diff(dts), self.longest) or second / 25
        self.moved = np.zeros(len(pts), dtype=bool)
        self.restarts: list[int] = []

    def clock(self) -> Clock | None:
        if self.ordered and not self._mend_dts():
            return None
        self._mend_pts()
        order = np.lexsort((np.arange(len(self.pts)), self.pts))
        ticks = self.pts[order]
        equal = self._part(ticks)
        repairs = []
        if self.restarts:
            where = ", ".join(str(int(np.flatnonzero(order == packet)[0])) for packet in self.restarts[:5])
            repairs.append(
                f"the clock restarts or jumps {_times(len(self.restarts))} (at frame {where}"
                f"{', ...' if len(self.restarts) > 5 else ''}), and the parts are put one after the other"
            )
        if self.moved.any():
            repairs.append(f"{_frames(int(self.moved.sum()))} had no time or a wrong one, and got one between others")
        if equal:
            repairs.append(f"{_frames(equal)} had the time of another, and got one just behind it")
        last = int(order[-1])
        end = int(ticks[-1] + self.duration[last]) if self.duration[last] > 0 else None
        return Clock(ticks, np.argsort(order), end, tuple(repairs))

    def _mend_dts(self) -> bool:
        """Make decoding times ascend; False where they cannot serve as a clock."""
        break_ = 0
        while True:
            steps = np.diff(self.dts[break_:])
            breaks = np.flatnonzero((steps < 0) | (steps > self.longest))
            if not len(breaks):
                return True
            break_ += int(breaks[0]) + 1
            if len(self.restarts) >= _MOST_RESTARTS or self.moved.sum() > len(self.dts) // 2:
                return False
            stray = self._stray(break_)
            if stray is None:
                self._restart(break_)
            else:
                self._put_between(*stray)
                break_ = max(0, stray[0] - 1)

    def _stray(self, break_: int) -> tuple[int, int] | None:
        """The packets [first, last) around a break that left a gap as long as themselves; None at a restart."""
        dts, found, count = self.dts, [], 0
        if dts[break_] < dts[break_ - 1]:
            # Those before the break that are ahead of it ...
            ahead = dts[:break_][::-1] >= dts[break_]
            count = int(ahead.argmin()) if not ahead.all() else break_
            if self._room(break_ - count - 1, break_):
                found.append((break_ - count, break_))
        # ... or those behind it, until a packet goes on where the one before the break stopped.
        steps = dts[break_ + 1 :] - dts[break_ - 1]
        goes_on = (steps > 0) & (steps <= self.longest)
        if goes_on.any():
            last = break_ + 1 + int(goes_on.argmax())
            if self._room(break_ - 1, last):
                found.append((break_, last))
        if not found and count == break_ == 1:  # the first packet of all is ahead of the second
            found.append((0, 1))
        return min(found, key=lambda part: part[1] - part[0], default=None)

    def _room(self, before: int, after: int) -> bool:
        """Whether the packets between two others fit into the time between those, and about fill it."""
        if before < 0:
            return False
        count, gap = after - before - 1, self.dts[after] - self.dts[before]
        if not 0 < gap <= self.longest:
            return False
        return count == 1 or 0.5 * (count + 1) * self.step <= gap <= 2 * (count + 1) * self.step

    def _put_between(self, first: int, last: int) -> None:
        """Move stray packets into the gap that they left, and keep their distances where those fit."""
        part = slice(first, last)
        start = self.dts[first - 1] if first else self.dts[last] - 2 * self.step
        gap = float(self.dts[last] - start)
        inside = (self.dts[part] - self.dts[first]).astype(float)
        if (np.diff(inside) > 0).all() and inside[-1] < gap:
            wanted = start + (gap - inside[-1]) / 2 + inside
        else:
            wanted = start + gap * np.arange(1, last - first + 1) / (last - first + 1)
        shift = np.rint(wanted).astype(np.int64) - self.dts[part]
        # The presentation time is wrong as well, unless it is where it should be without the shift.
        delay = int(np.median(self.pts - self.dts))
        follow = np.abs(self.pts[part] + shift - wanted - delay) < np.abs(self.pts[part] - wanted - delay)
        self.pts[part] += np.where(follow, shift, 0)
        self.dts[part] += shift
        self.moved[part] |= follow

    def _restart(self, break_: int) -> None:
        """Move the packets after a break to where those before it end."""
        before = self.pts[:break_]
        last = int(before.argmax())
        length = int(self.duration[last]) if self.duration[last] > 0 else round(self.step)
        shift = before[last] + length - self.pts[break_ : break_ + MOST_REORDERED].min()
        self.pts[break_:] += shift
        # Decoding times must ascend as well, even where the two parts are reordered differently.
        self.dts[break_:] = np.maximum(self.dts[break_:] + shift, self.dts[break_ - 1])
        self.restarts.append(break_)

    def _mend_pts(self) -> None:
        """Give packets without a believable presentation time one in the largest gap around their decoding time."""
        lost = self.unplaced.copy()
        if self.ordered:
            lost |= self.pts < self.dts
        if self.longest < np.inf:
            lost |= _is_late(self.pts, self.dts, self.step)
        while True:
            kept = np.flatnonzero(~lost)
            if len(kept) <= len(self.pts) // 2:
                return
            displacement = _displacement(np.argsort(self.pts[kept], kind="stable"))
            if displacement.max() <= MOST_REORDERED:
                break
            # One wrong time displaces every packet it passes by one place, and itself by all of them.
            order = np.argsort(self.pts[kept], kind="stable")
            lost[kept[order[displacement.argmax()]]] = True
        delay = int(np.median((self.pts - self.dts)[kept]))
        taken = np.sort(self.pts[kept])
        for packet in np.flatnonzero(lost):
            goal = self.dts[packet] + delay
            near = np.searchsorted(taken, goal)
            around = taken[max(0, near - MOST_REORDERED) : near + MOST_REORDERED]
            gaps = np.diff(around)
            if len(gaps) and gaps.max() > 1.5 * self.step:
                place = int(around[gaps.argmax()] + gaps.max() // 2)
            elif len(taken):  # no hole inside: it is the first or the last
                place = int(taken[0] - self.step) if goal < taken[0] else int(taken[-1] + self.step)
            else:
                place = int(goal)
            self.pts[packet] = place
            taken = np.insert(taken, np.searchsorted(taken, place), place)
        self.moved |= lost

    def _part(self, ticks: np.ndarray) -> int:
        """Put equal ones of ascending `ticks`, in place, a millisecond apart, or closer where that is too far."""
        equal = 0
        for place in (np.flatnonzero(np.diff(ticks) <= 0) + 1).tolist():
            if ticks[place] > ticks[place - 1]:
                continue
            later = np.flatnonzero(ticks[place:] > ticks[place - 1])
            count = int(later[0]) if len(later) else len(ticks) - place
            room = int(ticks[place + count] - ticks[place - 1]) if len(later) else _MOST_TICKS
            step = max(1, min(round(self.second / 1000), room // (count + 1)))
            ticks[place : place + count] = ticks[place - 1] + step * np.arange(1, count + 1)
            equal += count
        ticks[:] = np.maximum.accumulate(ticks - np.arange(len(ticks))) + np.arange(len(ticks))
        return equal


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _frames(count: int) -> str:
    return "one frame" if count == 1 else f"{count} frames"
