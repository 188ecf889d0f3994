"""QLoRA and 8-bit AdamW, with bitsandbytes itself on the CPU: packed weights stay packed, runs resume bit for bit."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("bitsandbytes", reason="QLoRA and 8-bit states are bitsandbytes'")

from tests.capability.scripted import ScriptedMachine, without_gpu
from tests.train.test_recovery import faulty
from tests.train.tiny import (
    GPT2,
    LLAMA,
    checkpoint_parts,
    distance,
    identical,
    instructions,
    model_weights,
    settings,
)
from trainwarden.capability.verdict import unsupported
from trainwarden.errors import (
    GPUMemoryError,
    InvalidSettingError,
    QuantizationUnavailableError,
    TrainingAbortedError,
)
from trainwarden.events import StepCompleted
from trainwarden.testing import MemoryCeiling, out_of_memory_error
from trainwarden.train import Trainer, gates, quantized
from trainwarden.train.hub import Backoff
from trainwarden.train.models import load_model
from trainwarden.train.quantized import bitsandbytes, is_packed, pack, prepare_packed
from trainwarden.train.schedule import build_adamw

ROWS = instructions(24)
WIDE: dict[str, Any] = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}
"""Its larger weights have more than 4,096 elements: their moments are kept in 8 bits."""
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> ScriptedMachine:
    """A machine on which trying succeeded: tests/capability/test_quantized.py really tries."""
    scripted = without_gpu(installed=("torch", "bitsandbytes"))
    monkeypatch.setattr(gates, "Machine", lambda: scripted)
    return scripted


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from trainwarden.train.models import build_model

    folder = tmp_path_factory.mktemp("models") / "wide"
    torch.manual_seed(7)
    build_model(WIDE, tokenizer, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(model: Any, run_dir: Path, **changes: Any) -> Any:
    return Trainer(model, ROWS, output_dir=run_dir, **settings(**{"mode": "qlora", **changes})).train()


def stop_after(step: int) -> list[Any]:
    def observe(event: Any) -> None:
        if isinstance(event, StepCompleted) and event.step == step:
            signal.raise_signal(signal.SIGTERM)

    return [observe]


def interrupted_and_continued(model: Any, run_dir: Path, **asked: Any) -> None:
    with pytest.raises(TrainingAbortedError):
        train(model, run_dir, observers=stop_after(3), **asked)
    assert train(model, run_dir, **asked).steps_completed == 6


# -- packed weights ----------------------------------------------------------------------------------------------


def loaded(folder: Path, **options: Any) -> Any:
    model = load_model(folder, dtype=torch.float32, backoff=Backoff(), say=lambda _: None, packed_on=CPU, **options)
    prepare_packed(model)
    return model


class Largest(TorchDispatchMode):
    """Bytes of floating-point tensors that are alive together at most, but for one's views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.device.type == "cpu":
            storage = out.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                self._alive[key] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, key, None)
                self.most = max(self.most, sum(self._alive.values()))
        return out


def test_linear_layers_are_packed_while_they_are_read_and_the_output_layer_is_not(wide_dir: Path) -> None:
    model = loaded(wide_dir)
    packed = {name for name, module in model.named_modules() if is_packed(module)}
    assert len(packed) == 2 * 7
    assert not any("lm_head" in name for name in packed)
    for name in packed:
        layer = model.get_submodule(name)
        assert layer.weight.dtype is torch.uint8
        assert layer.weight.numel() == layer.in_features * layer.out_features // 2
        assert not layer.weight.requires_grad
        assert layer.weight.quant_state.nested, "the scales are quantised as well"


def test_weights_are_never_together_in_full_precision(tokenizer: Any, tmp_path: Path) -> None:
    """Read one after the other: what is alive at once is a few layers' worth, however many there are."""
    from trainwarden.train.models import build_model

    deep = {**WIDE, "num_hidden_layers": 12}
    model = build_model(deep, tokenizer, dtype=torch.float32)
    model.save_pretrained(tmp_path / "deep")
    whole = sum(4 * p.numel() for name, p in model.named_parameters() if "layers" in name)
    rest = sum(4 * p.numel() for name, p in model.named_parameters() if "layers" not in name)
    del model
    with Largest() as seen:
        loaded(tmp_path / "deep")
    assert seen.most - rest < whole / 3


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_model_in_memory_is_packed_in_place_and_computes_nearly_the_same(config: Any, tokenizer: Any) -> None:
    from trainwarden.train.models import build_model

    torch.manual_seed(1)
    model = build_model(config, tokenizer, dtype=torch.float32).eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        pack(model, torch.float32)
        prepare_packed(model)
        after = model(input_ids=ids).logits
    assert sum(map(is_packed, model.modules())) == (14 if config is LLAMA else 8)
    assert 0 < float((after - before).norm() / before.norm()) < 0.2
    pack(model, torch.float32)  # a second time changes nothing
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, after)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    class Odd(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(InvalidSettingError, match="no linear layer to pack"):
        pack(Odd(), torch.float32)


def test_an_evaluation_leaves_the_packed_weights_in_their_layout(wide_dir: Path) -> None:
    """On processors with AVX512-BF16 bitsandbytes would turn them into a layout without gradients."""
    model = loaded(wide_dir)
    model.eval()
    before = {name: p.clone() for name, p in model.named_parameters() if p.dtype is torch.uint8}
    with torch.no_grad():
        model(input_ids=torch.arange(6).reshape(1, 6))
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


def test_nothing_asks_the_hub_for_kernels_while_bitsandbytes_is_imported() -> None:
    seen: list[Any] = []
    before = sys.modules.get("kernels")
    with quantized.bitsandbytes_from_here():
        seen.append(sys.modules["kernels"])
    assert seen == [before]
    assert sys.modules.get("kernels") is before
    assert bitsandbytes().__version__


# -- QLoRA in a trainer ------------------------------------------------------------------------------------------


def test_adapters_on_packed_weights_learn_what_adapters_on_whole_ones_do(tmp_path: Path, wide_dir: Path) -> None:
    packed = train(wide_dir, tmp_path / "packed", eval_rows=4)
    whole = train(wide_dir, tmp_path / "whole", mode="lora", eval_rows=4)
    assert packed.final_loss < packed.first_loss
    assert packed.final_loss == pytest.approx(whole.final_loss, rel=0.05)
    assert packed.eval_loss == pytest.approx(whole.eval_loss, rel=0.05)


def test_its_checkpoint_holds_the_adapter_only_and_resumes_bit_for_bit(tmp_path: Path, wide_dir: Path) -> None:
    asked = {"lora_dropout": 0.1, "gradient_checkpointing": True, "dtype": "bfloat16"}
    train(wide_dir, tmp_path / "whole", **asked)
    saved = checkpoint_parts(tmp_path / "whole")["model"]
    assert saved
    assert all("lora_" in name for name in saved)
    interrupted_and_continued(wide_dir, tmp_path / "parts", **asked)
    assert identical(model_weights(tmp_path / "parts"), model_weights(tmp_path / "whole"))


def test_what_it_exports_loads_with_plain_peft_on_the_whole_model(tmp_path: Path, wide_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train(wide_dir, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(wide_dir, local_files_only=True)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "model").eval()(input_ids=ids).logits
    assert float((adapted - plain).abs().max()) > 1e-3
    assert not any("absmax" in name or "quant" in name for name in model_weights(tmp_path))


def test_a_batch_that_fits_no_longer_is_trained_in_parts_with_the_same_result(tmp_path: Path, wide_dir: Path) -> None:
    asked = {"max_steps": 4, "learning_rate": 1e-3}
    train(wide_dir, tmp_path / "undisturbed", **asked)
    ceiling = MemoryCeiling(4, from_step=2)
    trainer = faulty(wide_dir, tmp_path / "squeezed", rows=ROWS, wrap=ceiling, mode="qlora", **asked)
    ceiling._steps_completed = lambda: trainer.steps
    assert trainer.train().shrinks == 1
    assert distance(model_weights(tmp_path / "squeezed"), model_weights(tmp_path / "undisturbed")) < 1e-4


def test_a_new_model_is_packed_too(tmp_path: Path) -> None:
    assert train(GPT2, tmp_path, max_steps=1).steps_completed == 1
    assert (tmp_path / "model" / "base_model").is_dir()


# -- 8-bit states ------------------------------------------------------------------------------------------------


def test_moments_of_larger_weights_take_a_byte_each() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    optimizer = build_adamw(model, learning_rate=0.1, weight_decay=0.2, device=CPU, kind="adamw_8bit")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["state1"].dtype is torch.uint8
    assert optimizer.state[model[1].weight]["state1"].dtype is torch.float32


@pytest.mark.parametrize("mode", ["full", "qlora"])
def test_8_bit_states_are_checkpointed_and_continued_bit_for_bit(tmp_path: Path, wide_dir: Path, mode: str) -> None:
    asked = {"mode": mode, "optimizer": "adamw_8bit", "learning_rate": 1e-3, "lora_rank": 64}
    train(wide_dir, tmp_path / "whole", **asked)
    kept = [leaf for leaf in tensors(checkpoint_parts(tmp_path / "whole")["optimizer"]) if leaf.dtype is torch.uint8]
    assert len(kept) >= 4
    interrupted_and_continued(wide_dir, tmp_path / "parts", **asked)
    assert identical(model_weights(tmp_path / "parts"), model_weights(tmp_path / "whole"))


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(item)


def test_8_bit_states_train_nearly_what_whole_ones_do(tmp_path: Path, wide_dir: Path) -> None:
    asked = {"mode": "full", "learning_rate": 1e-3, "max_steps": 4}
    train(wide_dir, tmp_path / "whole", **asked)
    train(wide_dir, tmp_path / "bytes", optimizer="adamw_8bit", **asked)
    assert 0 < distance(model_weights(tmp_path / "bytes"), model_weights(tmp_path / "whole")) < 1e-2


def test_a_step_that_lacks_memory_ends_the_run_as_of_any_optimizer_that_cannot_be_finished(
    tmp_path: Path, wide_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has changed by then cannot be told, so the weights of the last checkpoint count."""
    kind = bitsandbytes().optim.AdamW8bit
    update, calls = kind.update_step, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) >= 40:
            raise out_of_memory_error()
        return update(self, *args)

    monkeypatch.setattr(kind, "update_step", failing)
    with pytest.raises(GPUMemoryError, match="AdamW8bit is not known to update each parameter by itself") as caught:
        train(wide_dir, tmp_path, mode="full", optimizer="adamw_8bit", checkpoint_every_steps=1)
    assert caught.value.steps_completed == 1
    assert caught.value.checkpoint_path is not None


# -- where it cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "qlora"}, "4-bit weights are not available on cpu: bitsandbytes is not installed"),
        ({"optimizer": "adamw_8bit"}, "8-bit optimizer states are not available on cpu"),
    ],
)
def test_without_bitsandbytes_it_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(gates, "Machine", without_gpu)
    with pytest.raises(QuantizationUnavailableError, match=said) as caught:
        train("there/is/no/such", tmp_path, **{"mode": "full", **changes})
    assert (caught.value.code, caught.value.exit_code) == ("DEP_QUANTIZATION_UNAVAILABLE", 69)
    assert not list(tmp_path.iterdir())


def test_a_trial_that_fails_is_refused_with_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {"nf4_on_cpu": unsupported("a 4-bit layer on cpu came out wrong", "use mode: lora")}
    broken = without_gpu(installed=("torch", "bitsandbytes"), answers=answers)
    monkeypatch.setattr(gates, "Machine", lambda: broken)
    with pytest.raises(QuantizationUnavailableError, match=r"came out wrong \(use mode: lora\)"):
        train(LLAMA, tmp_path)


def test_what_is_not_asked_for_is_not_tried(machine: ScriptedMachine, tmp_path: Path) -> None:
    Trainer(LLAMA, ROWS, output_dir=tmp_path, **settings())
    assert not machine.errands
    Trainer(LLAMA, ROWS, output_dir=tmp_path, **settings(mode="qlora", optimizer="adamw_8bit"))
    assert machine.tasks == {"nf4_on_cpu", "adam8bit_on_cpu"}
    assert len(machine.errands) == 1, "both in one process"


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "full", "full_ft_offload": True, "optimizer": "adamw_8bit"},
        {"mode": "qlora", "fp8": True},
        {"mode": "qlora", "full_ft_offload": True},
    ],
)
def test_settings_that_exclude_each_other_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError):
        Trainer(LLAMA, ROWS, output_dir=tmp_path, **settings(**changes))
