"""One trace: a training step of a model on fake CPU tensors, the optimizer's states already there, recorded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from trainwarden.memory.prediction import Phase
from trainwarden.memory.trace_fake import fake_batch, on_fake_cpu
from trainwarden.memory.trace_loop import TrainingLoop, run_steps
from trainwarden.memory.trace_place import Whereabouts, unit_of_name
from trainwarden.memory.trace_record import Record, Recorder
from trainwarden.memory.trace_values import masks_judged_by_values

DeviceType = Literal["cuda", "cpu"]


def record_steps(
    model: nn.Module,
    batch: Any,
    loop: TrainingLoop,
    *,
    units: Mapping[str, str],
    device_type: DeviceType,
    judge_masks: bool = True,
) -> Record:
    """The births and deaths of a step of ``model`` with optimizer states; it stays on the meta device.

    The states are made beforehand rather than by a first step, which takes half the time. Where a parameter gets no
    gradient, and so would have no states, two whole steps are traced. ``judge_masks``: see `masks_judged_by_values`; it
    needs a batch with values if the batch has a mask.
    """

    def record(states_first: bool) -> tuple[Record, bool]:
        return _record(model, batch, loop, units, device_type, judge_masks=judge_masks, states_first=states_first)

    found, each_has_a_gradient = record(states_first=True)
    return found if each_has_a_gradient else record(states_first=False)[0]


def _record(
    model: nn.Module,
    batch: Any,
    loop: TrainingLoop,
    units: Mapping[str, str],
    device_type: DeviceType,
    *,
    judge_masks: bool,
    states_first: bool,
) -> tuple[Record, bool]:
    """What was recorded, and whether each trainable parameter has got a gradient."""
    where = Whereabouts(model, units)
    recorder = Recorder(where, on_cpu=device_type == "cpu")
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    with ExitStack() as stack:
        stack.enter_context(on_fake_cpu(model, mode))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # about training, which this is not
        stack.enter_context(_quiet(logging.getLogger("torch._subclasses.fake_tensor")))
        batch = fake_batch(batch, mode)
        labels = _Labels(model, recorder, where, units, device_type)
        labels.placed(batch)
        stack.callback(labels.close)
        if judge_masks:
            stack.enter_context(masks_judged_by_values())
        stack.enter_context(where.followed())
        stack.enter_context(mode)
        stack.enter_context(recorder)
        run_steps(
            model,
            batch,
            loop,
            steps=1 if states_first else 2,
            watcher=labels,
            autocast=_autocast(loop.autocast),
            states_first=states_first,
        )
    return recorder.record, labels.each_has_a_gradient


class _Labels:
    """Watches the loop, and says of each storage that outlives a phase what it is."""

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        where: Whereabouts,
        units: Mapping[str, str],
        device_type: DeviceType,
    ) -> None:
        self._recorder = recorder
        self._where = where
        self._device_type = device_type
        self._model = model
        self._units = {id(p): unit_of_name(name, units) for name, p in model.named_parameters(remove_duplicate=False)}
        self._optimizers: list[torch.optim.Optimizer] = []
        self._without = {id(p) for p in model.parameters() if p.requires_grad}
        """Trainable parameters that have got no gradient yet."""
        self._handles = [
            p.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            for p in model.parameters()
            if p.requires_grad
        ]

    def placed(self, batch: Any) -> None:
        """What is there before the first step."""
        for parameter in self._model.parameters():
            self._recorder.label([parameter], "weights", self._units[id(parameter)], id(parameter))
        self._recorder.label(_attributes(self._model), "buffers")
        self._recorder.label([leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)], "batch")

    def enter(self, phase: Phase) -> None:
        self._label_states()
        self._where.enter(phase)
        self._recorder.begin_phase()

    def made(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._begun = len(self._recorder.record.events)
        if self._device_type == "cuda":
            for optimizer in optimizers:
                choose_as_on_cuda(optimizer)

    def warmed(self) -> None:
        record = self._recorder.record
        record.unlike = range(self._begun, len(record.events))

    @property
    def each_has_a_gradient(self) -> bool:
        return not self._without

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._without.discard(id(parameter))
            self._recorder.label([parameter.grad], "gradients", self._units[id(parameter)], id(parameter))

    def _label_states(self) -> None:
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]
                self._recorder.label(tensors, "optimizer_states", self._units.get(id(parameter), ""), id(parameter))


def choose_as_on_cuda(optimizer: torch.optim.Optimizer) -> None:
    """On CUDA torch's optimizers take their foreach variant unless told otherwise; on the CPU they loop."""
    for group in optimizer.param_groups:
        untold = "foreach" in group and group["foreach"] is None and not group.get("fused")
        if untold and not group.get("differentiable"):
            group["foreach"] = True


def _attributes(model: nn.Module) -> list[torch.Tensor]:
    homes = [home for module in model.modules() for home in (module._buffers, module.__dict__)]
    return [tensor for home in homes for tensor in home.values() if isinstance(tensor, torch.Tensor)]


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any] | None:
    return None if dtype is None else torch.autocast("cpu", dtype)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Keeps torch from printing the traceback of what is reported as the reason anyway."""
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was_disabled
