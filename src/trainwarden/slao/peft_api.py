"""The few functions of peft that merging needs: looked up when used, and named when this peft lacks them."""

from __future__ import annotations

import copy
import importlib
import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from trainwarden.errors import PeftAPIError, SLAOMergeError

from .factors import State


def peft_function(module: str, name: str) -> Any:
    """``name`` of a module of peft. Raises PeftAPIError when this peft has no such thing."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PeftAPIError(version=_version(), missing=f"{module}.{name}") from error


def read_model(model: Any, adapter_name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One adapter of a live peft model, as peft would save it: tensors of its own on the CPU, and its configuration.

    Raises SLAOMergeError when there is no such adapter, and PeftAPIError.
    """
    config = _config(model, adapter_name)
    collect = peft_function("peft", "get_peft_model_state_dict")
    # Embeddings that were only resized belong to the base model; trained ones are found without being asked for.
    state = collect(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {key: value.detach().to("cpu", copy=True) for key, value in state.items()}, _as_saved(model, config)


def install(model: Any, tensors: State, adapter_name: str = "default") -> None:
    """Put an adapter's tensors into a live peft model; their values are cast to its dtypes and devices.

    Raises SLAOMergeError when the model has no such adapter or no place for a tensor, and PeftAPIError.
    """
    _config(model, adapter_name)
    known = peft_function("peft", "get_peft_model_state_dict")(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    wrong = sorted(known.keys() ^ tensors.keys()) or [k for k in known if known[k].shape != tensors[k].shape]
    if wrong:
        problem = f"the model differs from it in {len(wrong)} tensors, such as {wrong[0]}"
        raise SLAOMergeError(adapter=adapter_name, problem=problem, problems=wrong)
    # peft copies with assign semantics in some versions: what it gets must not be anyone's state.
    own = {key: value.detach().clone().to(known[key].dtype) for key, value in tensors.items()}
    peft_function("peft", "set_peft_model_state_dict")(model, own, adapter_name=adapter_name)


def _config(model: Any, adapter_name: str) -> Any:
    # Not by the presence of methods: a peft model forwards unknown names to the base model, which has some of
    # them for adapters of its own.
    if not isinstance(model, peft_function("peft", "PeftModel")):
        raise SLAOMergeError(adapter=adapter_name, problem=f"{type(model).__name__} is not a peft model")
    if adapter_name not in model.peft_config:
        known = ", ".join(model.peft_config)
        raise SLAOMergeError(adapter=adapter_name, problem=f"the model has no such adapter; it has {known}")
    return model.peft_config[adapter_name]


def _as_saved(model: Any, config: Any) -> dict[str, Any]:
    saved = copy.copy(config)
    saved.inference_mode = True
    if saved.base_model_name_or_path is None:
        saved.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None)
    with tempfile.TemporaryDirectory() as folder:  # peft's own writer knows what to do with sets and enums
        saved.save_pretrained(folder)
        described: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_bytes())
    return described


def _version() -> str:
    try:
        return metadata.version("peft")
    except metadata.PackageNotFoundError:
        return "(not installed)"
