"""`probe` as a whole: complete, quick without a GPU, light, and readable by people, programs and GitHub."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from trainwarden.capability import Machine, ProbeReport, Status, Verdict, probe
from trainwarden.capability.machine import TorchBuild
from trainwarden.capability.requirements import ABILITIES, KINDS, Outcome, Requirement
from trainwarden.capability.verdict import unknown, unsupported
from trainwarden.errors import InvalidSettingError, RequirementUnmetError

from .scripted import GIB, ScriptedMachine, cards, gpus, without_gpu

ISSUE = ["vram>=80GiB", "sm>=90", "fp8", "nccl"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def good_machine(**changes: object) -> ScriptedMachine:
    return ScriptedMachine(
        **{"installed": ("torch", "torchao", "bitsandbytes"), "devices": cards(80 * GIB), **changes}  # type: ignore[arg-type]
    )


def test_a_good_machine_meets_everything_that_a_runner_asks_for() -> None:
    report = probe(
        [*ISSUE, "driver>=535", "cuda>=12.4", "gpus>=1", "ram>=64GiB", "disk>=50GiB", "adam8bit"],
        machine=good_machine(),
    )
    assert not report.unmet
    report.require()
    assert report.to_dict()["met"] is True


def test_every_name_that_can_be_required_is_probed() -> None:
    report = probe(machine=good_machine())
    assert set(ABILITIES) <= set(report.verdicts)
    assert set(KINDS) == set(report.quantities)
    assert all(verdict.reason for verdict in report.verdicts.values())


def test_each_unmet_requirement_is_named_with_what_was_found_and_why() -> None:
    machine = good_machine(gpus=gpus(89, total_bytes=24 * GIB), devices=cards(24 * GIB), installed=("torch",))
    report = probe(["vram>=80GiB", "sm>=90", "bf16", "fp8"], machine=machine)
    with pytest.raises(RequirementUnmetError) as caught:
        report.require()
    error = caught.value
    assert error.exit_code == 69
    assert error.message == (
        "3 of 4 requirements are not met: vram>=80GiB: found 24.00 GiB (on cuda:0 (GPU 89)); "
        "sm>=90: found 89 (on cuda:0 (GPU 89)); fp8: found unsupported (torchao is not installed)"
    )
    assert [one["requirement"] for one in error.details["unmet"]] == ["vram>=80GiB", "sm>=90", "fp8"]


def test_what_could_not_be_found_out_is_unmet_and_reads_unknown() -> None:
    report = probe(["nccl", "gpus>=1"], machine=good_machine(answers={"cuda": unknown("no answer within 60 s")}))
    assert [outcome.status for outcome in report.unmet] == ["unknown", "unknown"]
    with pytest.raises(RequirementUnmetError, match="found unknown .no answer within 60 s"):
        report.require()


def test_nothing_required_is_nothing_unmet() -> None:
    report = probe(machine=without_gpu())
    report.require()
    assert report.to_dict()["met"] is None


def test_a_wrong_requirement_is_refused_before_anything_is_tried() -> None:
    machine = good_machine()
    with pytest.raises(InvalidSettingError, match=r"requirements\[1\]"):
        probe(["fp8", "vram>80"], machine=machine)
    assert not machine.errands


def test_ranks_are_tried_once_for_each_gpu_that_works() -> None:
    machine = good_machine(gpus=gpus(90, 90, 90))
    probe(machine=machine)
    assert sum("collective" in errand.tasks for errand in machine.errands) == 3


def test_a_gpu_that_computes_wrongly_is_not_tried_further() -> None:
    wrong = {"cuda": unsupported("a matrix product on cuda:0 came out wrong", devices=gpus(90))}
    machine = good_machine(answers=wrong)
    report = probe(["nccl", "gpus>=1"], machine=machine)
    assert "collective" not in machine.tasks
    assert all("came out wrong" in outcome.reason for outcome in report.unmet)


@pytest.mark.parametrize(
    "machine",
    [
        without_gpu(),
        without_gpu(installed=("torch", "torchao", "bitsandbytes")),
        good_machine(library_problem="libcuda.so.1: cannot open shared object file"),
        good_machine(build=None),
    ],
)
def test_without_torch_or_driver_no_process_is_started(machine: ScriptedMachine) -> None:
    report = probe(machine=machine)
    assert not machine.errands
    gpu = ("cuda", "bf16", "fp8", "flash_attention", "adam8bit", "nccl", "fsdp")
    assert {report.verdicts[name].status for name in gpu} == {Status.UNSUPPORTED}


def test_rocm_is_tried_without_nvidias_library() -> None:
    machine = good_machine(build=TorchBuild("2.13.0", None, "6.4"), library_problem="libcuda.so.1: cannot open")
    probe(machine=machine)
    assert "bf16" in machine.tasks


def test_the_report_is_json() -> None:
    report = probe(ISSUE, machine=good_machine())
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["abilities"]["fp8"]["status"] == "supported"
    assert document["quantities"]["vram"] == {
        "amount": 80 * GIB,
        "found": "80.00 GiB",
        "reason": "on cuda:0 (NVIDIA H100)",
        "status": "supported",
    }
    assert [one["status"] for one in document["requirements"]] == ["met"] * 4


def test_the_rows_say_status_reason_and_fix() -> None:
    report = probe(["fp8"], machine=without_gpu())
    assert dict(report.ability_rows())["fp8"].startswith("unsupported: no CUDA: torch 2.13.0+cpu")
    assert "check `nvidia-smi`" in dict(report.ability_rows())["fp8"]
    assert dict(report.requirement_rows())["fp8"].startswith("unmet: found unsupported (no CUDA")
    assert dict(report.quantity_rows())["disk"] == "100.00 GiB: free where the command runs"


def test_github_gets_an_error_line_for_each_unmet_requirement_only() -> None:
    report = probe(["disk>=50GiB", "vram>=80GiB"], machine=without_gpu())
    [line] = report.github_lines()
    assert line == (
        "::error title=vram>=80GiB is unmet::found no usable GPU: no CUDA: torch 2.13.0+cpu is built without it"
    )


def test_github_lines_cannot_be_broken_out_of() -> None:
    outcome = Outcome(Requirement("fp8"), "unmet", "50%", "first\r\n::set-output name=x::y", "a, b: c")
    [line] = ProbeReport({}, {}, [outcome]).github_lines()
    assert line == "::error title=fp8 is unmet::found 50%25: first%0D%0A::set-output name=x::y; a, b: c"
    assert "\n" not in line


@no_gpu
def test_this_machine_without_a_gpu_meets_none_of_the_requirements_of_the_issue() -> None:
    report = probe(ISSUE)
    assert len(report.unmet) == 4


@no_gpu
def test_a_cuda_build_on_a_machine_without_a_driver_is_told_apart() -> None:
    class CudaBuild(Machine):
        def torch_build(self) -> TorchBuild | None:
            return TorchBuild("2.13.0+cu126", "12.6")

    fp8: Verdict = probe(machine=CudaBuild()).verdicts["fp8"]
    assert "no NVIDIA driver: libcuda.so.1" in fp8.reason


def test_asking_imports_no_torch_and_leaves_cuda_alone() -> None:
    script = (
        "import sys; from trainwarden.capability import probe, require_fp8; probe(['fp8']); "
        "sys.exit('torch' in sys.modules or 'torchao' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    script = (
        "from trainwarden.capability import Machine; print(Machine().torch_build()); import sys; "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert repr(str(torch.__version__)) in done.stdout
    assert Machine().torch_build() == TorchBuild(str(torch.__version__), torch.version.cuda, torch.version.hip)


def test_what_is_installed_is_found_without_importing_it() -> None:
    assert Machine().installed("torch")
    assert not Machine().installed("no_such_package_at_all")
    assert not Machine().installed("no_such_package.at_all")
