"""What a trainer asks of the machine at construction: what degrades is said once a run, the rest is refused at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.capability.scripted import ScriptedMachine, without_gpu
from tests.train.tiny import LLAMA, instructions, settings
from trainwarden.capability.machine import TorchBuild
from trainwarden.capability.verdict import unsupported
from trainwarden.cli.main import main
from trainwarden.errors import (
    FP8UnsupportedError,
    FSDPUnavailableError,
    GPUNotAvailableError,
    InvalidSettingError,
    MLXUnavailableError,
)
from trainwarden.events import Event, Notice
from trainwarden.runs import read_events
from trainwarden.train import Trainer, gates

ROWS = instructions(16)
NO_CUDA = "FP8 cannot be used, training in bf16: no CUDA: torch 2.13.0+cpu is built without it"
MAC = ("Darwin", "arm64")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ScriptedMachine:
    """A machine without a GPU, in the place of this one."""
    return put(monkeypatch, without_gpu())


def put(monkeypatch: pytest.MonkeyPatch, scripted: ScriptedMachine) -> ScriptedMachine:
    monkeypatch.setattr(gates, "Machine", lambda: scripted)
    return scripted


def trainer(run_dir: Path | str = "runs/x", model: Any = "there/is/no/such", **changes: Any) -> Trainer:
    asked = {"max_steps": 4, "device": "auto", "mode": "lora", "observers": (), **changes}
    return Trainer(model, ROWS, output_dir=run_dir, **settings(**asked))


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice) and "FP8 cannot" in event.text]


def told_in(run_dir: Path) -> list[str]:
    """What the event log of the run keeps of it."""
    return [event["text"] for event in read_events(run_dir / "events.jsonl") if "FP8 cannot" in event.get("text", "")]


# -- nothing asked for, nothing asked ------------------------------------------------------------------------------


def test_a_trainer_that_asks_for_nothing_tries_nothing(machine: ScriptedMachine) -> None:
    granted = trainer()._granted
    assert (granted.fp8, granted.offload, granted.warnings) == (None, None, ())
    assert not machine.errands


# -- FP8 -----------------------------------------------------------------------------------------------------------


def test_fp8_without_a_gpu_trains_in_bf16_and_says_so_once_a_run(
    tmp_path: Path, machine: ScriptedMachine, llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    made = trainer(tmp_path, llama_dir, fp8=True, device="auto", observers=[events.append])
    assert not events, "a trainer that is only constructed says nothing"
    result = made.train()
    assert result.steps_completed == 4
    assert notices(events) == [NO_CUDA]
    assert told_in(tmp_path) == [NO_CUDA]
    assert any("computing in bfloat16 (what goes with FP8, and stands in for it)" in str(event) for event in events)
    assert not capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_on_a_machine_that_is_not_scripted_it_is_the_same(tmp_path: Path, llama_dir: Path) -> None:
    events: list[Event] = []
    trainer(tmp_path, llama_dir, fp8=True, max_steps=1, observers=[events.append]).train()
    [warning] = notices(events)
    assert warning.startswith("FP8 cannot be used, training in bf16: no ")


def test_without_observers_it_is_one_line_on_stderr(
    tmp_path: Path, machine: ScriptedMachine, llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, llama_dir, fp8=True, max_steps=1, observers=None).train()
    lines = [line for line in capsys.readouterr().err.splitlines() if "FP8 cannot" in line]
    assert lines == [f"warden: {NO_CUDA}"]


def test_each_part_of_a_run_says_it_again(tmp_path: Path, machine: ScriptedMachine, llama_dir: Path) -> None:
    """A resumed run may have come to another machine."""
    trainer(tmp_path, llama_dir, fp8=True, max_steps=2, schedule="constant").train()
    trainer(tmp_path, llama_dir, fp8=True, max_steps=4, schedule="constant", accept_changes=["max_steps"]).train()
    assert told_in(tmp_path) == [NO_CUDA, NO_CUDA]


@pytest.mark.parametrize("where", [{"device": "cpu"}, {"backend": "cpu"}])
def test_fp8_on_a_cpu_that_was_asked_for_degrades_though_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, where: dict[str, Any]
) -> None:
    machine = put(monkeypatch, ScriptedMachine(installed=("torch", "torchao")))
    granted = trainer(fp8=True, **where)._granted
    assert not granted.trains_in_fp8
    [warning] = granted.warnings
    assert warning == "FP8 cannot be used, training in bf16: the device is cpu, as asked, which has no FP8 units"
    assert not machine.errands


def test_fp8_where_everything_works_is_granted_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, ScriptedMachine(installed=("torch", "torchao")))
    granted = trainer(fp8=True)._granted
    assert granted.trains_in_fp8
    assert not granted.warnings


def test_a_half_installed_torchao_is_refused_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"import_torchao": unsupported("trying it failed: ImportError: cannot import name 'ScalingType'")}
    build = TorchBuild("2.7.0+cu126", "12.6")
    put(monkeypatch, ScriptedMachine(installed=("torchao",), answers=broken, build=build))
    with pytest.raises(FP8UnsupportedError, match="ScalingType") as caught:
        trainer(fp8=True)
    assert caught.value.code == "RUNTIME_FP8_UNSUPPORTED"
    assert caught.value.exit_code == 69


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "full"}, "false with mode='full': FP8 is for LoRA"),
        ({"dtype": "float32"}, "false with dtype float32: what is not computed in FP8 is computed in bfloat16"),
        ({"dtype": "float16"}, "false with dtype float16"),
    ],
)
def test_fp8_with_settings_that_exclude_it_is_refused_before_the_machine_is_asked(
    machine: ScriptedMachine, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        trainer(fp8=True, **changes)
    assert caught.value.details["setting"] == "fp8"
    assert said in caught.value.details["expected"]
    assert not machine.errands


def test_fp8_on_a_model_in_4_bit_is_refused(machine: ScriptedMachine, tokenizer: Any) -> None:
    model = nn.Linear(16, 16)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # as transformers marks such a model
    with pytest.raises(InvalidSettingError, match="4-bit weights"):
        trainer(model=model, tokenizer=tokenizer, fp8=True)


# -- backend -------------------------------------------------------------------------------------------------------


def test_mlx_elsewhere_than_on_apple_silicon_is_a_wrong_setting(machine: ScriptedMachine) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        trainer(backend="mlx")
    assert caught.value.code == "CONFIG_INVALID_SETTING"
    assert caught.value.details["expected"] == (
        "auto or cpu or cuda here: MLX runs on macOS with Apple silicon, and this is Linux on x86_64"
    )


def test_mlx_on_a_mac_that_lacks_it_is_the_dependencys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, ScriptedMachine(system=MAC))
    with pytest.raises(MLXUnavailableError, match="mlx_lm is not installed"):
        trainer(backend="mlx")


def test_mlx_that_works_is_refused_while_nothing_trains_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, ScriptedMachine(system=MAC, installed=("mlx_lm",)))
    with pytest.raises(InvalidSettingError, match="training with MLX is not built"):
        trainer(backend="mlx")


@pytest.mark.parametrize(("backend", "device"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_backend_and_device_must_agree(backend: str, device: str) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        trainer(backend=backend, device=device)
    assert (caught.value.details["setting"], caught.value.details["value"]) == ("backend", backend)
    assert caught.value.details["expected"] == f"auto or {device} with device {device}"


@pytest.mark.parametrize(
    ("device", "backend", "asked"),
    [
        ("auto", "auto", "auto"),
        ("cpu", "auto", "cpu"),
        ("auto", "cpu", "cpu"),
        ("auto", "cuda", "cuda"),
        ("cuda", "cuda", "cuda"),
        ("cuda", "auto", "cuda"),
    ],
)
def test_either_setting_says_where_to_train(device: Any, backend: Any, asked: str) -> None:
    assert gates.device_asked(device, backend) == asked


def test_a_backend_that_is_not_there_ends_the_training_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GPUNotAvailableError):
        trainer(tmp_path, backend="cuda").train()


def test_the_cpu_as_backend_is_trained_on(tmp_path: Path, llama_dir: Path) -> None:
    events: list[Event] = []
    trainer(tmp_path, llama_dir, backend="cpu", max_steps=1, observers=[events.append]).train()
    assert any("device cpu (as asked)" in str(event) for event in events)


# -- offload -------------------------------------------------------------------------------------------------------


def test_offload_is_for_full_fine_tuning(machine: ScriptedMachine) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        trainer(full_ft_offload=True)
    assert caught.value.details["setting"] == "full_ft_offload"
    assert "false with mode lora" in caught.value.details["expected"]
    assert not machine.errands


def test_offload_without_cuda_is_the_typed_error_at_construction(machine: ScriptedMachine) -> None:
    with pytest.raises(FSDPUnavailableError, match="no CUDA") as caught:
        trainer(mode="full", full_ft_offload=True)
    assert (caught.value.code, caught.value.exit_code) == ("DEP_FSDP_UNAVAILABLE", 69)


def test_offload_on_a_cpu_that_was_asked_for_is_rehearsed_with_gloo(machine: ScriptedMachine) -> None:
    granted = trainer(mode="full", full_ft_offload=True, device="cpu")._granted
    assert granted.offload is not None
    assert granted.offload.supported
    [errand] = machine.errands
    assert errand.environ["WARDEN_PROBE_BACKEND"] == "gloo"


def test_offload_asks_whether_the_host_holds_the_model(
    monkeypatch: pytest.MonkeyPatch, llama_dir: Path, tokenizer: Any
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(gates, "require_fsdp_offload", lambda **settings: asked.append(settings["parameters"]))
    trainer(model=nn.Linear(10, 5), tokenizer=tokenizer, mode="full", full_ft_offload=True)
    trainer(model=llama_dir, mode="full", full_ft_offload=True)
    assert asked[0] == 55
    assert asked[1] == sum(tensor.numel() for tensor in weights_of(llama_dir))


def weights_of(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def test_a_model_that_cannot_be_counted_is_not_counted(tmp_path: Path) -> None:
    assert gates.parameter_count("a/hub-name") is None
    assert gates.parameter_count(LLAMA) is None
    assert gates.parameter_count(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert gates.parameter_count(tmp_path) is None


# -- through the command -------------------------------------------------------------------------------------------

CONFIG = """\
output_dir: runs/tiny
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
    num_attention_heads: 2, vocab_size: 300, max_position_embeddings: 32}
data: {train: rows.jsonl, max_length: 32}
trainer: {max_steps: 2, batch_size: 4}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is one plus one?", "response": "Two."}\n' * 16)
    return tmp_path


def test_warden_train_degrades_with_one_line_and_succeeds(
    work: Path, machine: ScriptedMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny.yaml", "-o", "trainer.fp8=true"]) == 0
    assert len(re.findall("FP8 cannot be used", capsys.readouterr().err)) == 1
    assert told_in(work / "runs" / "tiny") == [NO_CUDA]


@pytest.mark.parametrize(
    ("overrides", "status", "said"),
    [
        (
            ["trainer.fp8=true", "model.mode=full"],
            78,
            "trainer.fp8 is True, expected false with mode='full': FP8 is for LoRA, whose frozen layers are what it "
            "converts [flag]",
        ),
        (["trainer.backend=mlx"], 78, "backend is mlx, expected auto or cpu or cuda here: MLX runs on macOS"),
        (["trainer.backend=tpu"], 78, 'trainer.backend is "tpu", expected auto or cpu or cuda or mlx [flag]'),
        (
            ["trainer.backend=cuda", "trainer.device=cpu"],
            78,
            'trainer.backend is "cuda", expected auto or cpu with device cpu [flag]',
        ),
        (["trainer.full_ft_offload=true"], 78, "trainer.full_ft_offload is True, expected false with mode lora"),
        (["trainer.full_ft_offload=true", "model.mode=full"], 69, "DEP_FSDP_UNAVAILABLE"),
    ],
)
def test_warden_train_refuses_with_the_words_and_status_of_the_gate(
    work: Path,
    machine: ScriptedMachine,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    status: int,
    said: str,
) -> None:
    flags = [argument for override in overrides for argument in ("-o", override)]
    assert main(["train", "tiny.yaml", *flags]) == status
    assert said in capsys.readouterr().err
    assert not (work / "runs").exists(), "no run was begun"
