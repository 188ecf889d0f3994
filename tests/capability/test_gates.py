"""The gates of a trainer: what degrades degrades once and says why; the rest is the typed error, before any model."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from trainwarden.capability import (
    Machine,
    Status,
    Verdict,
    fp8_layers,
    require_backend,
    require_fp8,
    require_fsdp_offload,
)
from trainwarden.capability.children import Errand, Report
from trainwarden.capability.machine import TorchBuild
from trainwarden.capability.verdict import supported, unknown, unsupported
from trainwarden.device import HostMemory
from trainwarden.errors import FP8UnsupportedError, FSDPUnavailableError, InvalidSettingError, MLXUnavailableError

from .scripted import GIB, TAKEN, ScriptedMachine, without_gpu

MAC = ("Darwin", "arm64")
OLD_GPU = unsupported("cuda:0 has compute capability 8.6, and FP8 units begin with 8.9")


def fp8(machine: Machine, **settings: Any) -> tuple[Verdict, list[str]]:
    warnings: list[str] = []
    return require_fp8(machine=machine, warn=warnings.append, **settings), warnings


def test_fp8_goes_ahead_silently_where_everything_works() -> None:
    verdict, warnings = fp8(ScriptedMachine(installed=("torch", "torchao")))
    assert verdict.supported
    assert not warnings


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (without_gpu(), "no CUDA: torch 2.13.0+cpu is built without it"),
        (ScriptedMachine(build=None), "torch is not installed"),
        (ScriptedMachine(library_problem="libcuda.so.1: cannot open"), "no NVIDIA driver: libcuda.so.1: cannot open"),
        (ScriptedMachine(answers={"scaled_mm": OLD_GPU}), "compute capability 8.6"),
        (ScriptedMachine(answers={"scaled_mm": TAKEN}), "the device is taken"),
        (ScriptedMachine(), "torchao is not installed"),
        (
            ScriptedMachine(
                installed=("torchao",), answers={"convert_with_torchao": unsupported("trying it failed: KeyError")}
            ),
            "torchao converts no layer: trying it failed: KeyError",
        ),
        (
            ScriptedMachine(installed=("torchao",), answers={"import_torchao": unknown("no answer within 120 s")}),
            "no answer within 120 s",
        ),
    ],
)
def test_fp8_that_cannot_be_had_degrades_to_bf16_with_one_warning(machine: ScriptedMachine, reason: str) -> None:
    verdict, warnings = fp8(machine)
    assert verdict.status is Status.DEGRADED
    assert verdict.reason.startswith("bf16 instead of FP8: ")
    [warning] = warnings
    assert warning.startswith("FP8 cannot be used, training in bf16: ")
    assert reason in warning
    assert reason in verdict.reason


def test_the_warning_goes_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    require_fp8(machine=without_gpu())
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("warden: FP8 cannot be used, training in bf16: no CUDA")
    assert not printed.out


def test_nothing_is_started_where_there_can_be_no_gpu() -> None:
    machine = without_gpu(installed=("torch", "torchao"))
    fp8(machine)
    assert not machine.errands


def test_a_torchao_that_cannot_be_imported_is_an_error_that_says_what_to_install() -> None:
    broken = {"import_torchao": unsupported("trying it failed: ImportError: cannot import name 'ScalingType'")}
    machine = ScriptedMachine(installed=("torchao",), answers=broken, build=TorchBuild("2.7.0+cu126", "12.6"))
    with pytest.raises(FP8UnsupportedError, match="cannot import name 'ScalingType'") as caught:
        fp8(machine)
    assert caught.value.exit_code == 69
    assert "torch 2.7.0+cu126" in caught.value.suggestion
    assert "fp8=False" in caught.value.suggestion


def test_a_broken_torchao_on_a_gpu_without_fp8_only_degrades() -> None:
    answers = {"scaled_mm": OLD_GPU, "import_torchao": unsupported("trying it failed")}
    assert fp8(ScriptedMachine(installed=("torchao",), answers=answers))[0].status is Status.DEGRADED


class HalfInstalled(ScriptedMachine):
    """The GPU is scripted; torchao is imported for real, in a process of its own."""

    def run(self, errands: list[Errand], *, deadline_s: float) -> list[Report]:  # type: ignore[override]
        real = [errand for errand in errands if "import_torchao" in errand.tasks]
        answers = iter(Machine.run(self, real, deadline_s=deadline_s))
        return [
            next(answers) if errand in real else report
            for errand, report in zip(errands, super().run(errands, deadline_s=deadline_s), strict=True)
        ]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError(\"cannot import name 'ScalingType' from 'torch'\")", "cannot import name 'ScalingType'"),
        ("import os; os.abort()", "trying it ended the process with SIGABRT"),
    ],
)
def test_a_half_installed_torchao_is_found_out_without_harm_to_this_process(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FP8UnsupportedError) as caught:
        fp8(HalfInstalled(installed=("torchao",)))
    assert said in caught.value.details["problem"]


def test_compiled_kernels_of_another_torch_are_mentioned_and_do_not_stop_fp8() -> None:
    printed = "Skipping import of cpp extensions due to incompatible torch version 2.13"
    verdict, warnings = fp8(ScriptedMachine(installed=("torchao",), printed=printed))
    assert verdict.supported
    assert "its compiled kernels are not for torch" in verdict.reason
    assert not warnings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "full"}, "mode='full'"),
        ({"method": "orpo"}, "method='orpo'"),
        ({"load_in_4bit": True}, "4-bit"),
    ],
)
def test_fp8_with_settings_that_exclude_it_is_refused_before_anything_is_tried(
    settings: dict[str, Any], said: str
) -> None:
    machine = ScriptedMachine(installed=("torchao",))
    with pytest.raises(InvalidSettingError) as caught:
        fp8(machine, **settings)
    assert caught.value.details["setting"] == "fp8"
    assert said in caught.value.details["expected"]
    assert not machine.errands


@pytest.mark.parametrize(
    ("shapes", "status", "convertible"),
    [
        ([(4096, 4096), (16, 32)], Status.SUPPORTED, 2),
        ([(4096, 4096), (64, 30)], Status.DEGRADED, 1),
        ([(30, 64), (64, 30), (8, 8)], Status.UNSUPPORTED, 0),
        ([], Status.UNSUPPORTED, 0),
    ],
)
def test_layers_compute_in_fp8_only_when_sixteen_divides_both_dimensions(
    shapes: list[tuple[int, int]], status: Status, convertible: int
) -> None:
    verdict = fp8_layers(shapes)
    assert verdict.status is status
    assert verdict.evidence == {"layers": len(shapes), "convertible": convertible}


def test_offload_goes_ahead_and_says_how_large_a_model_the_host_holds() -> None:
    verdict = require_fsdp_offload(machine=ScriptedMachine())
    assert verdict.supported
    assert "60.0 GiB of host memory hold about 4.0 billion parameters at 16 bytes each" in verdict.reason


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (without_gpu(), "no CUDA"),
        (ScriptedMachine(answers={"collective": unsupported("this torch has no NCCL")}), "no NCCL"),
        (ScriptedMachine(answers={"collective": unknown("no answer within 120 s")}), "no answer within 120 s"),
        (ScriptedMachine(answers={"sharded": unsupported("trying it failed: RuntimeError")}), "trying it failed"),
    ],
)
def test_offload_that_cannot_run_is_the_typed_error_and_never_less(machine: ScriptedMachine, reason: str) -> None:
    with pytest.raises(FSDPUnavailableError, match=reason) as caught:
        require_fsdp_offload(machine=machine)
    assert caught.value.exit_code == 69


def test_a_model_that_the_host_cannot_hold_is_refused_with_both_amounts() -> None:
    short = {"collective": supported("right", world_size=1, ranks_short_of_host_memory=1)}
    machine = ScriptedMachine(answers=short, memory=HostMemory(64 * GIB, 60 * GIB, GIB, "machine"))
    with pytest.raises(FSDPUnavailableError, match="1 of 1 ranks have too little host memory") as caught:
        require_fsdp_offload(parameters=8_000_000_000, machine=machine)
    assert caught.value.details["needed_bytes"] == 128_000_000_000
    assert caught.value.details["available_bytes"] == 60 * GIB
    [errand] = machine.errands
    assert errand.environ["WARDEN_PROBE_ENOUGH_HOST_MEMORY"] == "False"


def test_another_backend_than_those_that_exist_is_refused() -> None:
    with pytest.raises(InvalidSettingError, match="one of auto, cpu, cuda, mlx"):
        require_backend("tpu", runners=("cpu", "cuda"), machine=ScriptedMachine())


@pytest.mark.parametrize("backend", ["auto", "cuda", "cpu"])
def test_ordinary_backends_need_no_trial(backend: str) -> None:
    machine = ScriptedMachine()
    assert require_backend(backend, runners=("cpu", "cuda"), machine=machine) is None
    assert not machine.errands


def test_mlx_off_apple_silicon_is_a_wrong_setting_with_the_reason() -> None:
    with pytest.raises(InvalidSettingError) as caught:
        require_backend("mlx", runners=("cpu", "cuda"), machine=ScriptedMachine())
    assert caught.value.details["expected"] == (
        "auto or cpu or cuda here: MLX runs on macOS with Apple silicon, and this is Linux on x86_64"
    )


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (ScriptedMachine(system=MAC), "mlx_lm is not installed"),
        (ScriptedMachine(system=MAC, installed=("mlx_lm",), answers={"mlx": unsupported("SIGILL")}), "SIGILL"),
    ],
)
def test_mlx_that_does_not_work_on_a_mac_is_the_dependencys_error(machine: ScriptedMachine, reason: str) -> None:
    with pytest.raises(MLXUnavailableError, match=reason):
        require_backend("mlx", runners=("cpu", "mlx"), machine=machine)


def test_mlx_that_works_is_still_refused_by_a_caller_that_cannot_train_with_it() -> None:
    machine = ScriptedMachine(system=MAC, installed=("mlx_lm",))
    with pytest.raises(InvalidSettingError, match="training with MLX is not built"):
        require_backend("mlx", runners=("cpu", "cuda"), machine=machine)
    verdict = require_backend("mlx", runners=("cpu", "mlx"), machine=machine)
    assert verdict is not None
    assert verdict.supported
