"""The ring of frame slots: the only place where full-size images wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from drivers.frame import Frame, Image

Memory = NDArray[np.uint8]
Allocate = Callable[[int], Memory]


@dataclass(eq=False, slots=True)
class Slot:
    """Memory for one frame; it grows to the largest frame it has seen and is then reused as it is."""

    allocate: Allocate | None = None
    """Gives so many bytes; None: any memory will do."""
    memory: Memory = field(default_factory=lambda: np.empty(0, np.uint8))
    lent: Image | None = None
    """The image that it holds, where that stayed in the driver's own memory."""

    def reserve(self, size: int) -> None:
        """Have room for a frame of so many bytes."""
        if self.memory.nbytes < size:
            self.memory = np.empty(size, np.uint8) if self.allocate is None else self.allocate(size)

    def store(self, image: Image) -> Image:
        """Copy an image in and return the view of the copy."""
        self.reserve(image.nbytes)
        view: Image = self.memory[: image.nbytes].view(image.dtype).reshape(image.shape)
        np.copyto(view, image)
        return view


class FrameRing:
    """A fixed number of slots, leased by acquisition and given back once their frame is judged.

    An image that the driver lends stays where it is. Acquisition lets go of it, so that the driver has its memory
    back in the thread that grabs.
    """

    def __init__(self, slots: int, allocate: Allocate | None) -> None:
        """Prepare.

        Args:
            slots: how many.
            allocate: gives a slot so many bytes when its first frame comes, or a larger one; None: any memory
                will do, the driver's own, too.
        """
        self._allocate = allocate
        self._free = [Slot(allocate) for _ in range(slots)]
        self._changed = threading.Condition()
        self._lends = 0
        self._borrowing: set[Slot] = set()
        self._to_return: list[Image] = []

    def lease(self, timeout_s: float) -> Slot | None:
        """Take a free slot, waiting up to `timeout_s`; None when all stay taken."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free, timeout_s):
                return None
            return self._free.pop()

    def reserve(self, size: int, lends: int) -> None:
        """Make ready for a camera: room in all free slots for frames of so many bytes, and how many it lends."""
        with self._changed:
            self._lends = lends if self._allocate is None else 0
            for slot in self._free:
                slot.reserve(size)

    def keep(self, slot: Slot, frame: Frame) -> None:
        """Have the frame's image stay as it is while the slot is leased: lent by the driver, or copied."""
        if frame.image is None:
            raise AssertionError("a frame without an image needs no slot")
        with self._changed:
            if len(self._borrowing) < self._lends:
                self._borrowing.add(slot)
                slot.lent = frame.image
                return
        frame.image = slot.store(frame.image)

    def give_back(self, slot: Slot) -> None:
        """Return a slot; its memory may be overwritten from now on."""
        with self._changed:
            self._end_loan(slot)
            self._free.append(slot)
            self._changed.notify()

    def replace(self, slot: Slot) -> None:
        """Put a new slot in the place of one that whoever leased it may use for ever."""
        with self._changed:
            self._end_loan(slot)
        self.give_back(Slot(self._allocate))

    def _end_loan(self, slot: Slot) -> None:
        if slot.lent is not None:
            self._to_return.append(slot.lent)
            slot.lent = None
            self._borrowing.discard(slot)

    def return_loans(self) -> None:
        """Let go of lent images that are not needed any more; for the thread that grabs."""
        with self._changed:
            returned, self._to_return = self._to_return, []
        returned.clear()  # outside the lock: this may call the driver

    def abandon_loans(self) -> list[Image]:
        """Return what a driver lent that does not answer: to let go of it could hang as the driver does."""
        with self._changed:
            for slot in list(self._borrowing):
                self._end_loan(slot)
            abandoned, self._to_return = self._to_return, []
            return abandoned

    @property
    def free_slots(self) -> int:
        """Number of slots that nobody holds."""
        with self._changed:
            return len(self._free)
