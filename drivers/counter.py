"""From a camera's own frame counter to the number of frames that went missing."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PLAUSIBLE_GAP = 32_767
"""A larger jump is a counter that was reset, not frames that were lost."""
INVALID_ID = (1 << 64) - 1
"""GenTL and pylon mark a block id that the transport does not provide with the largest uint64."""


@dataclass(slots=True)
class BlockIdCounter:
    """Count frames missing between consecutive block ids of one acquisition.

    GigE Vision 1.x ids are 16 bits wide, start at 1 and wrap from 65535 to 1, never to 0 (GigE Vision
    2.2, section "Block ID"); USB3 Vision ids are 64 bits wide and start at 0.
    """

    first_id: int = 0
    wraps_after: int | None = None
    """Last id before the counter returns to `first_id`; None for a counter that never wraps."""
    _last_id: int | None = None

    @classmethod
    def gige(cls) -> BlockIdCounter:
        """Make a counter for 16-bit GigE Vision ids: 1 … 65535, then 1 again."""
        return cls(first_id=1, wraps_after=65535)

    @classmethod
    def gige_extended(cls) -> BlockIdCounter:
        """Make a counter for 64-bit GigE Vision ids, from 1."""
        return cls(first_id=1)

    @classmethod
    def usb(cls) -> BlockIdCounter:
        """Make a counter for USB3 Vision ids (and pylon's emulator), from 0."""
        return cls(first_id=0)

    def missing_before(self, block_id: int) -> int:
        """Return how many frames are missing between the previous id and this one."""
        if block_id == INVALID_ID:
            return 0
        if self.wraps_after is not None and not self.first_id <= block_id <= self.wraps_after:
            return 0
        last_id, self._last_id = self._last_id, block_id
        if last_id is None:
            missing = block_id - self.first_id
            return missing if 0 <= missing <= MAX_PLAUSIBLE_GAP else 0
        step = block_id - last_id
        if self.wraps_after is not None:
            period = self.wraps_after - self.first_id + 1
            step %= period
            if step > period // 2:  # more than half the range ahead is a step backwards
                step = 0
        return step - 1 if 0 < step <= MAX_PLAUSIBLE_GAP else 0
