"""Tensors that lie in pieces on the ranks (DTensor, as FSDP2 leaves its parameters): whole on rank 0, and back.

A checkpoint holds whole plain tensors, whoever wrote it, so that it can be continued with another number of ranks or
in one process. Everything here that says collective is called by all ranks, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwarden.runtime.ranks import is_rank_failure, reachable


def is_sharded(value: Any) -> bool:
    """Whether ``value`` is a DTensor; torch's module for them is not imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")  # a value can only be one if the process has imported it
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank; all of an ordinary one."""
    if type(tensor) is Tensor or not is_sharded(tensor):
        return tensor
    here: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return here


# -- rank 0 takes the whole ------------------------------------------------------------------------------------------


def whole_model_state(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` with whole tensors on rank 0; on other ranks the sharded ones are None. Collective."""
    keeping = model.state_dict(keep_vars=True)  # the parameters themselves: tied ones are recognised, and sent once
    found: dict[int, Tensor | None] = {}

    def taken(value: Any) -> Any:
        if not is_sharded(value):
            return value.detach() if isinstance(value, Tensor) else value
        if id(value) not in found:
            found[id(value)] = whole(value)
        return found[id(value)]

    for key, value in keeping.items():
        keeping[key] = taken(value)
    return keeping


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors on rank 0; on other ranks the sharded ones are None. Collective."""
    state = optimizer.state_dict()
    if not any(is_sharded(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        return state
    state["state"] = _mapped(state["state"], lambda value: whole(value) if is_sharded(value) else value)
    return state


def whole(tensor: Any) -> Tensor | None:
    """All of a sharded tensor on rank 0, on the host where there are several ranks; None on the others. Collective.

    Ranks other than 0 hold no more than their own piece, unless the tensor is laid out otherwise than in rows over one
    mesh dimension.
    """
    mesh = tensor.device_mesh
    piece = local(tensor)
    if mesh.size() == 1:
        return piece
    with reachable("gather of the state", is_failure=is_rank_failure):
        if mesh.ndim > 1 or not tensor.placements[0].is_shard(0):
            everything: Tensor = tensor.detach().full_tensor()
            return everything.cpu() if dist.get_rank() == 0 else None
        return _gathered_rows(piece, int(tensor.shape[0]), mesh)


def _gathered_rows(piece: Tensor, rows: int, mesh: Any) -> Tensor | None:
    group, size = mesh.get_group(), mesh.size()
    piece = _carried(piece, group)
    each = -(-rows // size)  # as torch.chunk cuts: the last ranks may hold fewer rows, or none
    padded = piece.new_zeros((each, *piece.shape[1:]))
    padded[: piece.shape[0]] = piece
    if dist.get_rank() != 0:
        dist.gather(padded, dst=0, group=group)
        return None
    everything = piece.new_empty((each * size, *piece.shape[1:]))
    dist.gather(padded, list(torch.split(everything, each)), dst=0, group=group)
    return everything[:rows].cpu()


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(value, change) for value in tree)
    return change(tree)


# -- every rank takes its piece --------------------------------------------------------------------------------------


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Puts whole tensors into a model, each rank its piece. Returns the keys that are missing and those unexpected.

    Raises what ``load_state_dict`` does, and ValueError for a whole tensor of another shape.
    """
    pieces = {key: value for key, value in model.state_dict().items() if is_sharded(value) and key in state}
    for key, piece in pieces.items():
        fill(piece, state[key])
    rest = {key: value for key, value in state.items() if key not in pieces}
    found = model.load_state_dict(rest, strict=False)
    return set(found.missing_keys) - set(pieces), set(found.unexpected_keys)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Puts the whole state of an optimizer back, each rank its piece of what lies in pieces.

    A state tensor of a parameter's shape lies as the parameter does. Raises what ``load_state_dict`` does.
    """
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(is_sharded(parameter) for parameter in own):
        optimizer.load_state_dict(dict(state))
        return
    saved = [index for group in state["param_groups"] for index in group["params"]]
    parameter_of = dict(zip(saved, own, strict=False))  # load_state_dict says what is wrong with their number

    def in_pieces(index: Any, value: Any) -> Any:
        parameter = parameter_of.get(index)
        if parameter is None or not is_sharded(parameter):
            return value
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        piece = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        fill(piece, value)
        return piece

    pieces = {
        index: {name: in_pieces(index, value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": pieces})


def spread(model: nn.Module, everything: dict[str, Tensor]) -> None:
    """Gives every rank its pieces of the parameters that rank 0 has whole, by name in ``everything``. Collective.

    For parameters that lie in rows over one mesh dimension; on ranks other than 0 ``everything`` is not read. It is
    emptied on the way, and no rank holds more of a parameter than its piece and, on rank 0, the whole. Buffers become
    those of rank 0.
    """
    with reachable("distribution of the weights", is_failure=is_rank_failure):
        for name, parameter in model.named_parameters():
            _scatter_rows(parameter, everything.pop(name) if dist.get_rank() == 0 else None)
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _scatter_rows(parameter: Any, everything: Tensor | None) -> None:
    mesh, rows = parameter.device_mesh, int(parameter.shape[0])
    group, size = mesh.get_group(), mesh.size()
    each = -(-rows // size)
    piece = local(parameter)
    padded = _carried(piece.new_empty((each, *piece.shape[1:])), group)
    pieces: list[Tensor] | None = None
    if everything is not None:
        rest = (0, 0) * (everything.ndim - 1)
        chunks = [everything[each * rank : each * (rank + 1)].to(padded.device) for rank in range(size)]
        pieces = [nn.functional.pad(chunk, (*rest, 0, each - chunk.shape[0])).contiguous() for chunk in chunks]
    dist.scatter(padded, pieces, src=0, group=group)
    with torch.no_grad():
        piece.copy_(padded[: piece.shape[0]])


def fill(piece: Any, everything: Tensor) -> None:
    """Copies this rank's piece of ``everything`` into ``piece``. Not collective. Raises ValueError on other shapes."""
    from torch.distributed.tensor import distribute_tensor

    if everything.shape != piece.shape:
        raise ValueError(f"a tensor of shape {tuple(everything.shape)} where {tuple(piece.shape)} is expected")
    if piece.device_mesh.size() > 1:
        everything = local(distribute_tensor(everything, piece.device_mesh, piece.placements, src_data_rank=None))
    with torch.no_grad():
        local(piece).copy_(everything)


# -- one verdict for all ranks ---------------------------------------------------------------------------------------


def group_of(tensors: Iterable[Any]) -> dist.ProcessGroup | None:
    """The ranks over which the tensors lie in pieces; None where there is one rank, or none of them lies in pieces."""
    for tensor in tensors:
        if type(tensor) is not Tensor and is_sharded(tensor):
            mesh = tensor.device_mesh
            if mesh.size() == 1:
                return None
            group: dist.ProcessGroup | None = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
            return group
    return None


def summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of ``group``, the same on each; without a group ``value``. Collective with one."""
    if group is None:
        return value
    total = _carried(value, group).clone()
    with reachable("sum over the ranks", is_failure=is_rank_failure):
        dist.all_reduce(total, group=group)
    return total.to(value.device)


def _carried(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor where the group's backends can take it: NCCL alone takes nothing from the host."""
    return tensor if f"{tensor.device.type}:" in str(dist.get_backend_config(group)) else tensor.cuda()
