"""Cameras: each driver turns one kind of hardware into the same `Frame`."""
