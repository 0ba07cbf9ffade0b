"""The ring of frame slots: the only place where full-size images wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from drivers.frame import Image

Memory = NDArray[np.uint8]


@dataclass(eq=False, slots=True)
class Slot:
    """Memory for one frame; it grows to the largest frame it has seen and is then reused as it is."""

    allocate: Callable[[int], Memory]
    """Gives so many bytes."""
    memory: Memory = field(default_factory=lambda: np.empty(0, np.uint8))

    def reserve(self, size: int) -> None:
        """Have room for a frame of so many bytes."""
        if self.memory.nbytes < size:
            self.memory = self.allocate(size)

    def store(self, image: Image) -> Image:
        """Copy an image in and return the view of the copy."""
        self.reserve(image.nbytes)
        view: Image = self.memory[: image.nbytes].view(image.dtype).reshape(image.shape)
        np.copyto(view, image)
        return view


class FrameRing:
    """A fixed number of slots, leased by acquisition and given back once their frame is judged."""

    def __init__(self, slots: int, allocate: Callable[[int], Memory]) -> None:
        """Prepare; `allocate` gives a slot so many bytes when its first frame comes, or a larger one."""
        self._allocate = allocate
        self._free = [Slot(allocate) for _ in range(slots)]
        self._changed = threading.Condition()

    def lease(self, timeout_s: float) -> Slot | None:
        """Take a free slot, waiting up to `timeout_s`; None when all stay taken."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free, timeout_s):
                return None
            return self._free.pop()

    def reserve(self, size: int) -> None:
        """Have room in all free slots for frames of so many bytes, before the first one comes."""
        with self._changed:
            for slot in self._free:
                slot.reserve(size)

    def give_back(self, slot: Slot) -> None:
        """Return a slot; its memory may be overwritten from now on."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def replace(self) -> None:
        """Add a slot for one that whoever leased it will never let go."""
        self.give_back(Slot(self._allocate))

    @property
    def free_slots(self) -> int:
        """Number of slots that nobody holds."""
        with self._changed:
            return len(self._free)
