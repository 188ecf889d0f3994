"""Run in a process of its own: tries things that may print, hang or end the process, and writes down each answer.

``python -m trainwarden.capability.child ANSWERS TASK…`` appends two JSON lines a task to the file ANSWERS: one when
it begins, one with its verdict. The parent thus knows which task killed the process, whatever went to stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainwarden.capability.accelerator import FP8_RECIPE
from trainwarden.capability.verdict import NO_CUDA_FIX, Verdict, degraded, supported, unknown, unsupported

FP8_LEAST_SM = 89
BF16_LEAST_SM = 80
_BUSY = ("out of memory", "busy or unavailable")
"""What CUDA says when the device would be able but is taken: no verdict on the device follows from it."""


def main(arguments: Sequence[str]) -> int:
    """Do the tasks in order. The exit status says nothing: the file does."""
    answers, *names = arguments
    with Path(answers).open("a", encoding="utf-8") as file:
        for name in names:
            _write(file, {"task": name, "began": True})
            _write(file, {"task": name, "verdict": attempt(TASKS[name]).to_dict()})
    return 0


def _write(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def attempt(task: Callable[[], Verdict]) -> Verdict:
    """The task's verdict; what it raises is one too: unknown when the device was only busy."""
    try:
        return task()
    except Exception as error:  # noqa: BLE001 - boundary: foreign packages and drivers raise anything at all
        reason = said(error)
        if any(words in reason.lower() for words in _BUSY):
            return unknown(f"could not be tried, the device is taken: {reason}", "free the GPU and probe again")
        return unsupported(f"trying it failed: {reason}", error=type(error).__name__)


def said(error: BaseException) -> str:
    """The kind and the first line of an exception, at most 300 characters."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300].rstrip(": ")


def cuda() -> Verdict:
    """What torch sees, with the devices in ``evidence["devices"]``, after a matrix product on the one in use."""
    import torch

    hip = torch.version.hip
    facts: dict[str, Any] = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "hip": hip, "devices": []}
    if torch.version.cuda is None and hip is None:
        return unsupported("this torch is built without CUDA", NO_CUDA_FIX, **facts)
    if not torch.cuda.is_available():
        return unsupported("torch is built for CUDA and sees no usable device", NO_CUDA_FIX, **facts)
    for index in range(torch.cuda.device_count()):
        each = torch.cuda.get_device_properties(index)
        sm = None if hip else each.major * 10 + each.minor
        facts["devices"].append({"index": index, "name": each.name, "sm": sm, "total_bytes": int(each.total_memory)})
    where = gpu()
    if not right(where, torch.float32):
        return unsupported(f"a matrix product on {where} came out wrong", "the GPU may be damaged", **facts)
    return supported(f"a matrix product on {where} is right", **facts)


def bf16() -> Verdict:
    """A matrix product in bfloat16 on the GPU."""
    import torch

    if not torch.cuda.is_available():
        return unsupported("no CUDA device", NO_CUDA_FIX)
    where = gpu()
    if not right(where, torch.bfloat16):
        return unsupported(f"a matrix product in bfloat16 on {where} came out wrong", device=str(where))
    sm = sm_of(where)
    if sm is not None and sm < BF16_LEAST_SM:
        reason = f"only emulated: compute capability {dotted(sm)}, and bfloat16 units begin with 8.0"
        return degraded(reason, "train in float32 or float16", device=str(where), sm=sm)
    return supported(f"a matrix product on {where} is right", device=str(where), sm=sm)


def flash_attention() -> Verdict:
    """Torch's flash kernel, forward and backward, with every other kernel switched off."""
    import torch

    if not torch.cuda.is_available():
        return unsupported("no CUDA device", NO_CUDA_FIX)
    where = gpu()
    sm = sm_of(where)
    dtype = torch.bfloat16 if sm is None or sm >= BF16_LEAST_SM else torch.float16
    try:
        finite = flash_is_finite(where, dtype)
    except RuntimeError as error:
        if any(words in str(error).lower() for words in _BUSY):
            raise
        fix = "attention falls back to a slower kernel by itself"
        return unsupported(f"the kernel does not run on {where}: {said(error)}", fix, device=str(where), sm=sm)
    if not finite:
        return unsupported(f"the kernel's gradients on {where} are not finite", device=str(where), sm=sm)
    return supported(f"ran forward and backward on {where}", device=str(where), sm=sm)


def flash_is_finite(where: Any, dtype: Any) -> bool:
    """Whether the flash kernel's gradients are finite. RuntimeError where the kernel cannot be used."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    query = torch.randn(1, 2, 64, 64, device=where, dtype=dtype, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.autograd.backward(scaled_dot_product_attention(query, query, query, is_causal=True).sum())
    return query.grad is not None and bool(torch.isfinite(query.grad).all())


def scaled_mm() -> Verdict:
    """`torch._scaled_mm` as FP8 training uses it: forward in e4m3, gradients in e5m2 times e4m3."""
    import torch

    if not torch.cuda.is_available():
        return unsupported("no CUDA device", NO_CUDA_FIX)
    where = gpu()
    sm = sm_of(where)
    if sm is None:
        return unknown("not tried on ROCm, whose FP8 formats differ", "train in bf16", device=str(where))
    if sm < FP8_LEAST_SM:
        reason = f"{where} has compute capability {dotted(sm)}, and FP8 units begin with 8.9 (Ada, Hopper, Blackwell)"
        return unsupported(reason, "train in bf16", device=str(where), sm=sm)
    if not scaled_products_right(where):
        return unsupported(f"an FP8 matrix product on {where} came out wrong", "train in bf16", sm=sm)
    return supported(f"scaled matrix products in e4m3 and e5m2 on {where} are right", device=str(where), sm=sm)


def scaled_products_right(where: Any) -> bool:
    """Whether FP8 products of small whole numbers, which every format in it holds exactly, are exact."""
    import torch

    one = torch.ones((), device=where)
    left = (torch.arange(32 * 32, device=where).reshape(32, 32) % 3).float()
    factor = (torch.arange(32 * 48, device=where).reshape(48, 32) % 4).float()
    wanted = left.cpu() @ factor.cpu().t()
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        columns = factor.to(torch.float8_e4m3fn).t()  # the kernel wants its second operand column by column
        product = torch._scaled_mm(left.to(kind), columns, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        if not bool((product.cpu().float() == wanted).all()):
            return False
    return True


def import_torchao() -> Verdict:
    """Only the import that FP8 training begins with."""
    torchao = importlib.import_module("torchao")
    importlib.import_module("torchao.float8")
    version = getattr(torchao, "__version__", None)
    return supported(f"torchao {version or 'of unknown version'} imports", version=version)


def convert_with_torchao() -> Verdict:
    """One layer converted as FP8 training does it and, on a GPU, trained for one step."""
    float8 = importlib.import_module("torchao.float8")
    import torch

    on_gpu = torch.cuda.is_available()
    where = gpu() if on_gpu else torch.device("cpu")
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)).to(where, torch.bfloat16)
    float8.convert_to_float8_training(model, config=float8.Float8LinearConfig.from_recipe_name(FP8_RECIPE))
    if type(model[0]) is torch.nn.Linear:
        return unsupported("torchao converted nothing", "train in bf16")
    if not on_gpu:
        return supported("a layer can be converted; it was not run, for there is no CUDA device")
    model(torch.ones(32, 32, device=where, dtype=torch.bfloat16)).sum().backward()
    gradient = next(model.parameters()).grad
    if gradient is None or not bool(torch.isfinite(gradient).all()):
        return unsupported(f"a converted layer on {where} gives gradients that are not finite", "train in bf16")
    return supported(f"a converted layer ran forward and backward on {where}")


def adam8bit() -> Verdict:
    """One step of bitsandbytes' 8-bit AdamW on the GPU."""
    import torch

    if not torch.cuda.is_available():
        importlib.import_module("bitsandbytes")
        return unsupported("no CUDA device", NO_CUDA_FIX)
    return _adam8bit_on(gpu())


def adam8bit_on_cpu() -> Verdict:
    """The same on the CPU."""
    import torch

    return _adam8bit_on(torch.device("cpu"))


def _adam8bit_on(where: Any) -> Verdict:
    import torch

    bitsandbytes = importlib.import_module("bitsandbytes")
    weight = torch.nn.Parameter(torch.ones(64, 128, device=where))  # from 4096 elements on its state is 8-bit
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    changed = bool((weight < 1).all()) and bool(torch.isfinite(weight).all())
    version = getattr(bitsandbytes, "__version__", None)
    if not changed:
        return unsupported(f"a step of AdamW8bit on {where} came out wrong", "use adamw", version=version)
    return supported(f"a step of bitsandbytes' AdamW8bit on {where} is right", version=version, device=str(where))


def nf4() -> Verdict:
    """A 4-bit linear layer of bitsandbytes, forward and backward, on the GPU."""
    import torch

    if not torch.cuda.is_available():
        return unsupported("no CUDA device", NO_CUDA_FIX)
    return _nf4_on(gpu())


def nf4_on_cpu() -> Verdict:
    """The same on the CPU."""
    import torch

    return _nf4_on(torch.device("cpu"))


def _nf4_on(where: Any) -> Verdict:
    """Ones and their negatives are exact in NF4, so that the product is known."""
    import torch

    bitsandbytes = importlib.import_module("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": torch.ones(64, 128)})
    layer = layer.to(where)
    given = torch.ones(16, 128, device=where, requires_grad=True)
    product = layer(given)
    product.sum().backward()
    right = given.grad is not None and bool((product - 128).abs().max() < 1) and bool((given.grad - 64).abs().max() < 1)
    version = getattr(bitsandbytes, "__version__", None)
    packed = layer.weight.dtype == torch.uint8 and layer.weight.numel() == 64 * 128 // 2
    if not (right and packed):
        return unsupported(f"a 4-bit layer on {where} came out wrong", "use mode: lora", version=version)
    return supported(f"a 4-bit layer of bitsandbytes on {where} is right", version=version, device=str(where))


def mlx() -> Verdict:
    """A matrix product through MLX, and the import of mlx_lm."""
    core = importlib.import_module("mlx.core")
    importlib.import_module("mlx_lm")
    product = core.ones((64, 64)) @ core.ones((64, 64))
    if float(product[0, 0].item()) != 64.0:
        return unsupported("a matrix product came out wrong")
    return supported("a matrix product through MLX is right, and mlx_lm imports")


def collective() -> Verdict:
    from trainwarden.capability import collective as rank

    return rank.all_reduce(rank.Place.from_environ(os.environ))


def sharded() -> Verdict:
    from trainwarden.capability import collective as rank

    return rank.train_sharded(rank.Place.from_environ(os.environ))


TASKS: dict[str, Callable[[], Verdict]] = {
    "cuda": cuda,
    "bf16": bf16,
    "flash_attention": flash_attention,
    "scaled_mm": scaled_mm,
    "import_torchao": import_torchao,
    "convert_with_torchao": convert_with_torchao,
    "adam8bit": adam8bit,
    "adam8bit_on_cpu": adam8bit_on_cpu,
    "nf4": nf4,
    "nf4_on_cpu": nf4_on_cpu,
    "mlx": mlx,
    "collective": collective,
    "sharded": sharded,
}


def gpu() -> Any:
    """The device that this rank would train on."""
    import torch

    local = os.environ.get("LOCAL_RANK", "0")
    index = int(local) if local.isdecimal() else 0
    return torch.device("cuda", index if index < torch.cuda.device_count() else 0)


def sm_of(where: Any) -> int | None:
    """Compute capability as 89 for 8.9; None on ROCm, where the numbers mean something else."""
    import torch

    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(where)
    return major * 10 + minor


def dotted(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}"


def right(where: Any, dtype: Any) -> bool:
    """Whether a product of values that every floating type holds exactly is exact."""
    import torch

    factor = torch.full((64, 64), 0.5, device=where, dtype=dtype)
    return bool(((factor @ factor).to("cpu", torch.float32) == 16.0).all())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
