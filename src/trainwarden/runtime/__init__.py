"""The guard around a training loop. ``guard.py`` composes; each other file holds one of its parts."""

from trainwarden.runtime.guard import Guard

__all__ = ["Guard"]
