"""The training loop of ranks whose weights lie in pieces on their hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from trainwarden.runtime.sharded import is_sharded, whole_model_state
from trainwarden.train.offload import Offload
from trainwarden.train.ranked_loop import RankedLoop


class OffloadedLoop(RankedLoop):
    """One run of a `Trainer` with ``full_ft_offload``, on one of its ranks. Its accelerator is the `Offload`."""

    _accelerator: Offload
    _whole: dict[str, Any]

    def _ends_together(self) -> bool:
        return self._accelerator.world_size == 1  # else the others wait in a collective of the step that failed

    def _placed(self, model: Any) -> Any:
        return self._accelerator.prepare(model)  # with every rank at once, so no rank tries it twice

    def _clip(self) -> Tensor:
        norm: Any = super()._clip()
        whole: Tensor = norm.full_tensor() if is_sharded(norm) else norm
        return whole

    def _evaluate(self, step: int) -> None:
        super()._evaluate(step)
        self._model.reshard()  # FSDP keeps the outermost weights gathered after a forward pass alone

    def _evaluation_rows(self) -> int:
        """The same on every rank, for all evaluate the same batches together."""
        return min(self._accelerator.ranks.gather(super()._evaluation_rows()))

    def _publish(self, folder: Path) -> None:
        self._whole = whole_model_state(self._model)
        super()._publish(folder)
        self._whole = {}

    def _save_weights(self, folder: Path) -> None:
        self._model.save_pretrained(folder, state_dict=self._whole)
