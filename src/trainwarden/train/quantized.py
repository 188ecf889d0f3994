"""What bitsandbytes does for a `Trainer`: frozen weights in 4 bits (QLoRA), and AdamW's moments in 8 bits.

It runs on CUDA and, slowly, on the CPU; `trainwarden.capability.require_quantized` finds out before a model is loaded.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainwarden.errors import InvalidSettingError

QUANT_TYPE = "nf4"
"""The four-bit type of QLoRA (arXiv 2305.14314), its scales quantised once more."""

_HUB_KERNELS = "kernels"
_LOGGER = "bitsandbytes.backends.cpu.ops"


@contextmanager
def bitsandbytes_from_here() -> Iterator[None]:
    """Imports of bitsandbytes inside take what is installed only.

    On processors with AVX512-BF16 its import asks the package ``kernels``, where that is installed, to download
    compiled code from the Hub, and logs that it could not.
    """
    absent = object()
    before = sys.modules.get(_HUB_KERNELS, absent)
    logger = logging.getLogger(_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    if before is absent:
        sys.modules[_HUB_KERNELS] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is absent:
            sys.modules.pop(_HUB_KERNELS, None)


def bitsandbytes() -> Any:
    """The package. ImportError where it is not installed."""
    with bitsandbytes_from_here():
        return importlib.import_module("bitsandbytes")


# -- 4-bit weights ----------------------------------------------------------------------------------------------------


def loading_settings(compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of transformers' ``from_pretrained`` that pack each linear weight as soon as it is read.

    Weights are never together in full precision: one at a time is read, packed on ``device``, and dropped. The output
    layer and whatever is no linear layer stay as they are.
    """
    from transformers import BitsAndBytesConfig

    bitsandbytes()
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=QUANT_TYPE,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": packing, "device_map": {"": str(device)}}


def pack(model: Any, compute: torch.dtype) -> None:
    """Packs the linear layers of a model in memory, one after the other, but for its output layer.

    Layers that were packed when they were read stay as they are. Raises InvalidSettingError where there is no linear
    layer at all.
    """
    layer_type, parameter_type = bitsandbytes().nn.Linear4bit, bitsandbytes().nn.Params4bit
    settings = {"compress_statistics": True, "quant_type": QUANT_TYPE}
    head = model.get_output_embeddings()
    packed = any(is_packed(module) for module in model.modules())
    for name, linear in [] if packed else list(model.named_modules()):
        weight = _plain_weight(linear)
        if weight is None or linear is head:
            continue
        with torch.device("meta"):
            layer = layer_type(*reversed(weight.shape), bias=linear.bias is not None, compute_dtype=compute, **settings)
        layer.weight = parameter_type(weight, requires_grad=False, module=layer, **settings)
        layer.bias = linear.bias
        model.set_submodule(name, layer.to(weight.device))  # moving is what packs
        packed = True
    if not packed:
        expected = f"lora or full: {type(model).__name__} has no linear layer to pack besides its output layer"
        raise InvalidSettingError(setting="mode", value="qlora", expected=expected)
    model.is_loaded_in_4bit = True  # by which peft knows


def _plain_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer, (out_features, in_features), with that of GPT-2's transposed layers turned."""
    if type(module) is nn.Linear:
        return module.weight.data
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
        return weight.t().contiguous()
    return None


def prepare_packed(model: nn.Module) -> None:
    """Readies packed layers, if a model has any, for training and for checkpoints without them.

    - Their state is left out of ``state_dict``: they are frozen, and packed anew from the same files on resume.
    - On processors with AVX512-BF16 an evaluation would lay the packed weights out anew, in a layout through which no
      gradient flows: that is switched off.
    """
    for layer in filter(is_packed, model.modules()):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        layer.requires_grad_(False)
        layer.register_state_dict_post_hook(_without_packing)  # type: ignore[no-untyped-call]


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a 4-bit layer of bitsandbytes, found without importing it."""
    known = sys.modules.get("bitsandbytes")
    return known is not None and isinstance(module, known.nn.Linear4bit)


def _without_packing(_: nn.Module, state: dict[str, Any], prefix: str, __: Mapping[str, Any]) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}weight.")]:
        del state[key]


# -- 8-bit optimizer states -------------------------------------------------------------------------------------------


def adamw_8bit(groups: list[dict[str, Any]], *, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW whose moments take a byte each, with a float32 scale for each 256 of them.

    Moments of parameters with fewer than 4,096 elements stay in float32.
    """
    optimizer: torch.optim.Optimizer = bitsandbytes().optim.AdamW8bit(groups, lr=learning_rate)
    return optimizer
