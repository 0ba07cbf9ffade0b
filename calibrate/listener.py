"""What long work off the line says while it goes on, and how it is asked to end."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot begin or go on; the message says why and what to change."""


class TrainingStopped(Exception):
    """The work was asked to stop; the message says where, and what is left of it."""


class Listener:
    """Hears what training says; the command line prints it, tests need not."""

    def say(self, message: str) -> None:
        """Tell a fact that the user should know."""

    def step(self, done: int, total: int, losses: dict[str, float]) -> None:
        """Tell how far training is."""

    def should_stop(self) -> bool:
        """Return True to end as soon as that can be done cleanly."""
        return False

    def go_on(self, where: str) -> None:
        """Raise TrainingStopped, with where it was and what is left of it, when the work is to end."""
        if self.should_stop():
            raise TrainingStopped(f"stopped {where}")
