"""State trees as named tensors plus JSON, and back. No pickle: reading a file can build data, never run code.

Stored exactly: None, bool, int of any size, float (sign of zero, infinities and NaN bits included), complex,
str, bytes, list, tuple, set, dict with scalar or tuple keys (order kept), OrderedDict (with the `_metadata`
that a module's `state_dict` carries), Counter, defaultdict of a builtin type, torch tensors, dtypes, devices
and sizes, numpy arrays and scalars of numeric and time kinds, and `pathlib.Path`. Whatever else there is
gets refused by its place in the tree.

Tensors come back on the CPU, detached, dense, with the memory order (such as channels_last) they had.
Tensors that were the same memory with the same shape and strides (tied weights) are stored once and come
back as one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainwarden.errors import CheckpointError

from .decoder import Decoder
from .encoder import Encoder, UnstorableError

Tree = Any
"""A nested state as `state_dict()` returns it; see the module for what may be in it."""
Skeleton = Any
"""The JSON value that says how the tensors of a tree fit together."""


def encode(tree: Tree, *, place: str = "state", path: Path | None = None) -> tuple[dict[str, Tensor], Skeleton]:
    """Split `tree` into its tensors, by readable names such as ``state.0.exp_avg``, and a JSON skeleton.

    Nothing is changed and no tensor is copied (save the rare ones that safetensors has no dtype for): the
    result refers to the live tensors, so write it before they change.

    Raises:
        CheckpointError: something cannot be stored; the problem names its place, which begins with `place`
            (``scheduler.lr_lambdas[0]: a function``). `path` is where the checkpoint was going to be.
    """
    encoder = Encoder(place)
    try:
        skeleton = encoder.encode(tree)
    except UnstorableError as error:
        raise CheckpointError(operation="save", path=path, problem=str(error)) from None
    return encoder.tensors, skeleton


def decode(tensors: Mapping[str, Tensor], skeleton: Skeleton, *, path: Path | None = None) -> Tree:
    """The tree that `encode` split. `path` is the checkpoint it came from, for the message.

    Raises:
        CheckpointError: the skeleton is not one that `encode` makes, or names a tensor that is not there.
    """
    try:
        return Decoder(tensors).decode(skeleton)
    except Exception as error:  # boundary: a forged skeleton can make constructors raise anything
        problem = f"the stored structure is malformed ({type(error).__name__}: {error})"
        raise CheckpointError(operation="load", path=path, problem=problem) from error
