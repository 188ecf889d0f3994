"""The trials themselves, as far as a CPU can run them; on a GPU the same functions run through `probe`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trainwarden.capability import Status, Verdict, child
from trainwarden.capability.verdict import supported

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_product_is_found_right_in_every_type(dtype: torch.dtype) -> None:
    assert child.right(CPU, dtype)


def test_a_product_that_is_off_by_a_little_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda one, other: multiply(one, other) + 0.125)
    assert not child.right(CPU, torch.bfloat16)


def test_fp8_products_are_compared_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert child.scaled_products_right(CPU)
    product = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: product(*a, **k) + 1)
    assert not child.scaled_products_right(CPU)


def test_the_flash_kernel_runs_forward_and_backward_where_it_exists() -> None:
    assert child.flash_is_finite(CPU, torch.bfloat16)


def test_no_other_attention_kernel_passes_for_flash() -> None:
    with pytest.raises(RuntimeError):
        child.flash_is_finite(torch.device("meta"), torch.int64)


@no_gpu
@pytest.mark.parametrize("task", ["cuda", "bf16", "flash_attention", "scaled_mm"])
def test_without_a_gpu_every_trial_of_it_says_so(task: str) -> None:
    verdict = child.attempt(child.TASKS[task])
    assert verdict.status is Status.UNSUPPORTED
    assert "CUDA" in verdict.reason
    assert verdict.fix


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
    ],
)
def test_a_device_that_is_taken_is_unknown_and_not_unable(error: Exception) -> None:
    assert child.attempt(_raising(error)).status is Status.UNKNOWN


@pytest.mark.parametrize("error", [RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"), KeyError("x"), ImportError("y")])
def test_whatever_else_a_trial_raises_is_the_reason_why_it_cannot(error: Exception) -> None:
    verdict = child.attempt(_raising(error))
    assert verdict.status is Status.UNSUPPORTED
    assert type(error).__name__ in verdict.reason


def _raising(error: Exception) -> Callable[[], Verdict]:
    def task() -> Verdict:
        raise error

    return task


def test_an_exception_is_said_in_one_short_line() -> None:
    assert child.said(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert child.said(RuntimeError()) == "RuntimeError"
    assert len(child.said(RuntimeError("x" * 9999))) == 300


def test_every_verdict_is_written_before_the_next_task_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = tmp_path / "answers"
    seen: list[str] = []

    def look() -> Verdict:
        seen.append(answers.read_text())
        return supported("second")

    monkeypatch.setattr(child, "TASKS", {"one": lambda: supported("first"), "two": look})
    assert child.main([str(answers), "one", "two"]) == 0
    assert '"reason": "first"' in seen[0]
    assert seen[0].endswith('{"task": "two", "began": true}\n')


FLOAT8 = """
    import torch

    class Float8Linear(torch.nn.Linear): pass

    class Float8LinearConfig:
        @staticmethod
        def from_recipe_name(name):
            return name

    def convert_to_float8_training(model, config):
        assert config == "rowwise"
        layer = Float8Linear(32, 32, bias=False)
        if {works}:
            model[0] = layer
        return model
"""


@pytest.fixture
def torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("torchao", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # or the stand-in would outlive the test
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("")
    return tmp_path / "torchao" / "float8.py"


@no_gpu
def test_a_conversion_that_cannot_be_run_says_that_it_was_not(torchao: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchao.write_text(textwrap.dedent(FLOAT8.format(works=True)))
    verdict = child.attempt(child.convert_with_torchao)
    assert verdict.supported
    assert "it was not run" in verdict.reason


def test_a_conversion_that_converts_nothing_is_found_out(torchao: Path) -> None:
    torchao.write_text(textwrap.dedent(FLOAT8.format(works=False)))
    assert child.attempt(child.convert_with_torchao).reason == "torchao converted nothing"


def test_mlx_is_tried_with_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    core = ModuleType("mlx.core")
    core.ones = torch.ones  # type: ignore[attr-defined]  # enough of MLX for one product
    for name, module in {"mlx": ModuleType("mlx"), "mlx.core": core, "mlx_lm": ModuleType("mlx_lm")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert child.attempt(child.mlx).supported
    core.ones = torch.zeros  # type: ignore[attr-defined]
    assert child.attempt(child.mlx).status is Status.UNSUPPORTED


def test_the_gpu_of_a_rank_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for local_rank, index in [("2", 2), ("7", 0), ("x", 0)]:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert child.gpu() == torch.device("cuda", index)


def test_a_compute_capability_is_written_with_its_point() -> None:
    assert (child.dotted(89), child.dotted(120)) == ("8.9", "12.0")
