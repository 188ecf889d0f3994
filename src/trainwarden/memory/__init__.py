"""How much memory a run will need, known before it starts.

Importing this room does not import torch; `trainwarden.memory.trace` does.
"""

from trainwarden.memory.prediction import KINDS, PHASES, Kind, Phase, Prediction, Source

__all__ = ["KINDS", "PHASES", "Kind", "Phase", "Prediction", "Source"]
