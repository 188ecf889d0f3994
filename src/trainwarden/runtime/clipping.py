"""What clipping has measured, kept until the step: the user's own norm says whether the gradients are finite.

Clipping also destroys the evidence: by a norm that is NaN every gradient becomes NaN, by an infinite one all become 0
but the culprit. So the norm of each gradient before it is kept too, on its device, and on the host the culprit is found
before it is too late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainwarden.guards.finite import Kind
from trainwarden.runtime.culprit import kind_of

_FOREACH = ("cpu", "cuda")


@dataclass
class Clipping:
    """One clipping of ``gradients``. ``norm`` is their total norm, ``parts`` that of each, both from before it."""

    gradients: list[Tensor]
    norm: Tensor
    parts: Tensor | None
    culprit: tuple[int, Kind] | None = None
    """Index and kind of the first gradient that was not finite, if that was seen on the host."""
    _versions: dict[int, int] = field(default_factory=dict)

    def seal(self) -> None:
        """After scaling: from here on the gradients are meant to stay as they are."""
        self._versions = {id(gradient): gradient._version for gradient in self.gradients}

    def covers(self, gradients: Sequence[Tensor]) -> bool:
        """Whether all of ``gradients`` were clipped and, by their version counters, left alone since."""
        versions = self._versions
        return bool(versions) and all(versions.get(id(gradient)) == gradient._version for gradient in gradients)

    def first_bad(self) -> tuple[Tensor, Kind] | None:
        """The first gradient that was not finite before clipping, and how; reads from the device."""
        if self.culprit is not None:
            return self.gradients[self.culprit[0]], self.culprit[1]
        for gradient, norm in zip(self.gradients, self.parts.tolist() if self.parts is not None else (), strict=False):
            if not math.isfinite(norm):
                return gradient, "nan" if math.isnan(norm) else "inf"
        return None


@torch.no_grad()
def measured(
    gradients: list[Tensor], norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> tuple[Tensor, Clipping | None]:
    """`torch.nn.utils.get_total_norm`, bit for bit, and what there is to keep of it.

    Nothing is kept where the norm does not tell whether the gradients are finite, or where it is computed otherwise
    (gradients of several kinds, distributed ones, no ``foreach``): torch's own function is called then.
    """
    norm_type = float(norm_type)
    plain = bool(gradients) and all(type(g) is Tensor and not g.is_sparse for g in gradients)
    alike = plain and len({(g.device, g.dtype) for g in gradients}) == 1 and gradients[0].device.type in _FOREACH
    if not alike or foreach is False or not norm_type >= 1.0:
        return torch.nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite, foreach), None
    parts = torch.stack(list(torch._foreach_norm(gradients, norm_type)))
    norm = torch.linalg.vector_norm(parts, norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        torch.nn.utils.get_total_norm(gradients, norm_type, True, foreach)  # raises, in its own words
    clipping = Clipping(gradients, norm, parts)
    if norm.is_cpu and not math.isfinite(norm.item()):
        kinds = ((index, kind_of(gradient)) for index, gradient in enumerate(gradients))
        clipping.culprit = next(((index, kind) for index, kind in kinds if kind is not None), None)
    return norm, clipping
