"""LoRA in FP8, emulated on the CPU: which layers compute in it, and that nothing else of a run is changed by it."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tests.capability.scripted import ScriptedMachine
from tests.train import tiny
from tests.train.test_recovery import RESUMABLE, crash_at, faulty
from tests.train.tiny import GPT2, LLAMA, checkpoint_parts, distance, identical, instructions, model_weights
from trainwarden.capability import FP8_RECIPE, fp8_layers
from trainwarden.errors import TrainingError
from trainwarden.events import Event, MetricsLogged, Notice
from trainwarden.testing import MemoryCeiling, out_of_memory_error
from trainwarden.train import Trainer, gates
from trainwarden.train import trainer as trainer_module
from trainwarden.train.fp8 import frozen_layers_in_fp8, plan
from trainwarden.train.models import LoraSettings, add_lora, build_model, quiet_torchao

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao (extra torchao)")
ROWS = instructions(24)
LORA = LoraSettings(4, 8.0, 0.0, "all-linear")
MATRICES = 7
"""Linear layers in a block of a Llama: four of attention, three of the MLP."""


def lora_model(tokenizer: Any, *, lora: LoraSettings = LORA, **changes: Any) -> Any:
    torch.manual_seed(3)
    base = build_model({**LLAMA, **changes}, tokenizer, dtype=torch.bfloat16)
    model = add_lora(base, lora, base=None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which begins with zeros, and so would hide the adapters from the loss
            nn.init.normal_(parameter, std=0.02)
    return model


def emulated(model: nn.Module, told: list[str] | None = None) -> Any:
    return frozen_layers_in_fp8(model, (told if told is not None else []).append, emulate=True)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def some_ids(rows: int, tokens: int = 13) -> Tensor:
    return torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(5))


# -- which layers --------------------------------------------------------------------------------------------------


def test_the_frozen_layers_are_converted_and_adapters_and_output_layer_are_not(tokenizer: Any) -> None:
    planned = plan(lora_model(tokenizer))
    assert len(planned.convert) == 2 * MATRICES
    assert all(name.endswith(".base_layer") for name in planned.convert)
    assert planned.left == {"the output layer": 1}
    assert planned.sentence == (
        "FP8: 14 of 15 linear layers compute in it, adapters not counted; in bf16 stays 1 (the output layer)"
    )


def test_a_layer_that_sixteen_does_not_divide_stays_in_bf16(tokenizer: Any) -> None:
    planned = plan(lora_model(tokenizer, intermediate_size=40))
    assert not any("mlp" in name for name in planned.convert)
    assert planned.left == {"the output layer": 1, "a dimension is not divisible by 16": 2 * 3}


def test_frozen_layers_without_an_adapter_are_converted_too(tokenizer: Any) -> None:
    planned = plan(lora_model(tokenizer, lora=LoraSettings(4, 8.0, 0.0, ["q_proj"])))
    assert len(planned.convert) == 2 * MATRICES
    assert sum(name.endswith("q_proj.base_layer") for name in planned.convert) == 2


def test_an_output_layer_with_an_adapter_is_still_left(tokenizer: Any) -> None:
    planned = plan(lora_model(tokenizer, lora=LoraSettings(4, 8.0, 0.0, ["q_proj", "lm_head"])))
    assert not any("lm_head" in name for name in planned.convert)
    assert planned.left == {"the output layer": 1}


class Quantized(nn.Linear):
    """As quantizing libraries derive theirs."""


def test_trained_and_foreign_layers_are_left_and_counted_by_their_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Quantized(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    model[0].requires_grad_(True)
    planned = plan(model)
    assert planned.convert == ["2"]
    assert planned.left == {"trained itself": 1, "Quantized is no plain linear layer": 1}
    assert planned.reasons == "1 (Quantized is no plain linear layer), 1 (trained itself)"


def test_a_layer_with_hooks_is_left_because_a_converted_one_would_lose_them() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: None)
    model[1]._hf_hook = object()  # type: ignore[assignment]  # as accelerate marks what it moves between devices
    planned = plan(model)
    assert planned.convert == ["2"]
    assert planned.left == {"hooks that a converted layer would not have": 2}


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=6))
@settings(deadline=None, max_examples=50, print_blob=True)
def test_as_many_are_converted_as_capability_says(shapes: list[tuple[int, int]]) -> None:
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(*shape) for shape in shapes).requires_grad_(False)
    assert len(plan(model).convert) == fp8_layers(shapes).evidence["convertible"]


# -- a converted layer ---------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def through(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of the input and matrix products of one forward and backward pass."""
    x = x.detach().requires_grad_()
    with Products() as products:
        output = layer(x)
        output.float().square().sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad, products.count


def frozen_layer(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 48, bias=bias)).to(torch.bfloat16).requires_grad_(False)


@needs_torchao
@pytest.mark.parametrize("bias", [False, True])
def test_it_gives_what_torchaos_own_gives_with_two_products_instead_of_three(bias: bool) -> None:
    import dataclasses

    with quiet_torchao():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    x = torch.randn(2, 7, 64, dtype=torch.bfloat16)
    own, theirs = frozen_layer(bias=bias), frozen_layer(bias=bias)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(FP8_RECIPE), emulate=True)
    convert_to_float8_training(theirs, config=config)
    expected, expected_gradient, three = through(theirs, x)
    with emulated(own):
        output, gradient, two = through(own, x)
    assert torch.equal(output, expected)
    assert torch.equal(gradient, expected_gradient)
    assert (two, three) == (2, 3)


@needs_torchao
def test_it_keeps_its_weight_alone_for_the_backward_pass() -> None:
    model = frozen_layer(bias=False)
    kept: list[tuple[int, ...]] = []
    x = torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True)

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with emulated(model), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    assert kept == [(48, 64)]


@needs_torchao
def test_it_is_close_to_bfloat16_and_is_not_bfloat16() -> None:
    model, x = frozen_layer(), torch.randn(32, 64, dtype=torch.bfloat16)
    reference = model(x)
    with emulated(model):
        output = model(x)
    off = float((output - reference).float().norm() / reference.float().norm())
    # e4m3 keeps three bits after the first: a rounding error of up to 1/16, about 1/40 on average, in each factor.
    assert 1e-3 < off < 0.06


@needs_torchao
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_what_it_makes_of_a_token_does_not_depend_on_the_others(rows: int) -> None:
    """So that a micro-batch that is cut in two gives the same; a scale for the whole would not."""
    model = frozen_layer()
    x = torch.randn(8, 5, 64, dtype=torch.bfloat16) * torch.logspace(-3, 3, 8).to(torch.bfloat16)[:, None, None]
    with emulated(model):
        whole, whole_gradient, _ = through(model, x)
        part, part_gradient, _ = through(model, x[:rows])
    assert torch.equal(part, whole[:rows])
    assert torch.equal(part_gradient, whole_gradient[:rows])


@needs_torchao
def test_a_number_that_is_none_stays_none_and_reaches_the_guard() -> None:
    model, x = frozen_layer(), torch.randn(4, 64, dtype=torch.bfloat16)
    x[2, 3] = torch.nan
    with emulated(model):
        output = model(x)
    assert output[2].isnan().all()
    assert output[[0, 1, 3]].isfinite().all()


@needs_torchao
def test_it_takes_any_number_of_tokens_and_the_type_of_autocast() -> None:
    model = frozen_layer().float().requires_grad_(False)
    with emulated(model), torch.autocast("cpu", dtype=torch.bfloat16):
        for tokens in (1, 15, 17):
            x = torch.randn(tokens, 64, requires_grad=True)
            output = model(x)
            output.float().sum().backward()
            assert (output.dtype, x.grad is not None and x.grad.dtype) == (torch.bfloat16, torch.float32)


# -- a converted model ---------------------------------------------------------------------------------------------


@needs_torchao
def test_names_and_parameters_are_the_same_and_the_model_is_given_back_as_it_was(tokenizer: Any) -> None:
    model = lora_model(tokenizer)
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    keys, told = list(model.state_dict()), []
    with emulated(model, told):
        kinds = [type(model.get_submodule(name)).__name__ for name in plan_of(modules)]
        assert set(kinds) == {"FrozenFloat8Linear"}
        inside = dict(model.named_parameters())
        assert inside.keys() == before.keys()
        assert all(inside[name] is before[name] for name in before)
        assert list(model.state_dict()) == keys
    assert [sentence.split(",")[0] for sentence in told] == ["FP8: 14 of 15 linear layers compute in it"]
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)


def plan_of(modules: dict[str, nn.Module]) -> list[str]:
    return [name for name in modules if name.endswith(".base_layer")]


@needs_torchao
def test_the_model_is_given_back_when_training_it_fails(tokenizer: Any) -> None:
    model = lora_model(tokenizer)
    with pytest.raises(LookupError), emulated(model):
        raise LookupError
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))


@needs_torchao
def test_gradients_are_finite_and_in_the_adapters_only(tokenizer: Any) -> None:
    model = lora_model(tokenizer)
    with emulated(model):
        loss = loss_of(model, some_ids(3))
        loss.backward()
    assert loss.isfinite()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.any() for gradient in gradients)


@needs_torchao
def test_adapters_merge_into_converted_layers_as_into_plain_ones(tokenizer: Any) -> None:
    plain, converted = lora_model(tokenizer), lora_model(tokenizer)
    plain.merge_adapter()
    with emulated(converted):
        converted.merge_adapter()
        assert identical(converted.state_dict(), plain.state_dict())
        converted.unmerge_adapter()
    plain.unmerge_adapter()
    assert identical(converted.state_dict(), plain.state_dict())


# -- when it cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
def test_a_model_without_linear_layers_trains_in_bf16_and_says_why(tokenizer: Any) -> None:
    told: list[str] = []
    torch.manual_seed(0)
    model = add_lora(build_model(GPT2, tokenizer, dtype=torch.bfloat16), LORA, base=None)
    with emulated(model, told):
        assert loss_of(model, some_ids(2)).isfinite()
    assert told == [
        "FP8 cannot be used, training in bf16: no linear layer of the model can be converted: 1 (the output layer)"
    ]
    told.clear()
    with emulated(nn.Embedding(4, 4), told):
        pass
    assert told[0].endswith("the model has no linear layer (torch.nn.Linear) besides adapters")


@needs_torchao
def test_a_conversion_that_fails_half_way_leaves_the_model_as_it_was(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet_torchao():
        from torchao import float8
    model, told = lora_model(tokenizer), []
    convert = float8.convert_to_float8_training

    def half(module: nn.Module, **settings: Any) -> None:
        convert(module, **settings)
        raise AssertionError("unsupported layer\nand a second line")

    monkeypatch.setattr(float8, "convert_to_float8_training", half)
    with emulated(model, told):
        assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    assert told == [
        "FP8 cannot be used, training in bf16: torchao failed to convert the model: AssertionError: unsupported layer"
    ]


@needs_torchao
def test_a_lack_of_memory_while_converting_is_not_taken_for_a_failure_of_torchao(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet_torchao():
        from torchao import float8

    convert = float8.convert_to_float8_training

    def no_memory(module: nn.Module, **settings: Any) -> None:
        convert(module, **settings)
        raise out_of_memory_error()

    monkeypatch.setattr(float8, "convert_to_float8_training", no_memory)
    model = lora_model(tokenizer)
    with pytest.raises(RuntimeError, match="out of memory"), emulated(model):
        pass
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))


def test_without_torchao_it_trains_in_bf16_and_says_so(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = lora_model(tokenizer), []
    monkeypatch.setitem(sys.modules, "torchao.float8", None)  # the import system's word for: not to be found
    with emulated(model, told):
        assert loss_of(model, some_ids(2)).isfinite()
    [sentence] = told
    assert sentence.startswith("FP8 cannot be used, training in bf16: torchao failed to convert the model: ")


@needs_torchao
def test_importing_torchao_prints_nothing_into_a_run() -> None:
    script = (
        "from trainwarden.train.models import quiet_torchao\n"
        "with quiet_torchao():\n"
        "    import torchao.float8\n"
        "import logging; logging.getLogger('torchao').warning('heard again')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    assert (done.stdout, done.stderr) == ("", "heard again\n")


# -- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fp8_granted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose gate grants FP8, a training on the CPU, and torchao's emulation of the products."""
    monkeypatch.setattr(gates, "Machine", lambda: ScriptedMachine(installed=("torch", "torchao")))
    monkeypatch.setattr(trainer_module, "choose_device", lambda asked: (torch.device("cpu"), "for the test"))
    emulating = functools.partial(frozen_layers_in_fp8, emulate=True)
    monkeypatch.setattr(trainer_module, "frozen_layers_in_fp8", emulating)
    return


def asked(**changes: Any) -> dict[str, Any]:
    return {"mode": "lora", "fp8": True, "device": "auto", "lora_rank": 4, **changes}


def train(model: Any, run_dir: Path, **changes: Any) -> Any:
    return Trainer(model, ROWS, output_dir=run_dir, **tiny.settings(**asked(**changes))).train()


@needs_torchao
@pytest.mark.usefixtures("fp8_granted")
def test_a_run_in_fp8_learns_about_as_well_as_one_in_bf16_and_says_what_it_converted(
    tmp_path: Path, llama_dir: Path
) -> None:
    events: list[Event] = []
    fp8 = train(llama_dir, tmp_path / "fp8", max_steps=12, observers=[events.append])
    bf16 = train(llama_dir, tmp_path / "bf16", max_steps=12, fp8=False, dtype="bfloat16")
    losses = [event.loss for event in events if isinstance(event, MetricsLogged)]
    assert losses[-1] < losses[0] - 0.1
    assert fp8.final_loss == pytest.approx(bf16.final_loss, rel=0.02)
    assert fp8.final_loss != bf16.final_loss
    told = [event.text for event in events if isinstance(event, Notice) and "FP8:" in event.text]
    assert told == [
        "FP8: 14 of 15 linear layers compute in it, adapters not counted; in bf16 stays 1 (the output layer)"
    ]


@needs_torchao
@pytest.mark.usefixtures("fp8_granted")
def test_what_it_saves_loads_with_peft_and_knows_nothing_of_fp8(tmp_path: Path, llama_dir: Path) -> None:
    before = load_file(llama_dir / "model.safetensors")
    train(llama_dir, tmp_path / "fp8")
    train(llama_dir, tmp_path / "bf16", fp8=False, dtype="bfloat16")
    saved, plain = model_weights(tmp_path / "fp8"), model_weights(tmp_path / "bf16")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in plain.items()
    }
    configs = [(tmp_path / run / "model" / "adapter_config.json").read_text() for run in ("fp8", "bf16")]
    assert configs[0] == configs[1]
    assert identical(load_file(llama_dir / "model.safetensors"), before)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_dir), tmp_path / "fp8" / "model")
    assert loss_of(loaded, some_ids(2)).isfinite()
    merged = loaded.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())


@needs_torchao
@pytest.mark.usefixtures("fp8_granted")
def test_a_model_object_is_given_back_with_its_own_layers(tmp_path: Path, llama_dir: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    train(model, tmp_path, tokenizer=tokenizer, max_steps=1)
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {"Linear"}


@needs_torchao
@pytest.mark.usefixtures("fp8_granted")
def test_a_batch_that_fits_no_longer_is_trained_in_parts_as_exactly_as_in_bf16(tmp_path: Path, llama_dir: Path) -> None:
    """Parts of 4 from the third of six steps on. What differs is the rounding of bfloat16, not that of FP8."""

    def apart(name: str, **changes: Any) -> float:
        train(llama_dir, tmp_path / name, learning_rate=1e-3, **changes)
        ceiling = MemoryCeiling(4, from_step=3)
        settings = asked(learning_rate=1e-3, **changes)
        squeezed = faulty(llama_dir, tmp_path / f"{name}-squeezed", wrap=ceiling, **settings)
        ceiling._steps_completed = lambda: squeezed.steps
        assert squeezed.train().shrinks == 1
        assert ceiling.struck == 1
        return distance(model_weights(tmp_path / f"{name}-squeezed"), model_weights(tmp_path / name))

    in_bf16 = apart("bf16", fp8=False, dtype="bfloat16")
    # Measured: 1.4 times as far apart as in bfloat16, and 17 times with one scale for the whole micro-batch.
    assert apart("fp8") < 5 * in_bf16


@needs_torchao
@pytest.mark.usefixtures("fp8_granted")
def test_a_resumed_run_is_bit_identical_and_its_checkpoints_hold_adapters_only(tmp_path: Path, llama_dir: Path) -> None:
    train(llama_dir, tmp_path / "undisturbed", **RESUMABLE)
    crashing = faulty(llama_dir, tmp_path / "crashed", before=crash_at(6), **asked(**RESUMABLE))
    with pytest.raises(TrainingError, match="LookupError: boom"):
        crashing.train()
    assert all("lora_" in name for name in checkpoint_parts(tmp_path / "crashed")["model"])
    result = train(llama_dir, tmp_path / "crashed", **RESUMABLE)
    assert result.steps_completed == 9
    assert identical(model_weights(tmp_path / "crashed"), model_weights(tmp_path / "undisturbed"))


@needs_torchao
@pytest.mark.usefixtures("fp8_granted")
def test_a_run_in_fp8_can_be_continued_where_there_is_none(
    tmp_path: Path, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parameters under the same names: the other machine says that it goes on in bf16."""
    with pytest.raises(TrainingError):
        faulty(llama_dir, tmp_path, before=crash_at(6), **asked(**RESUMABLE)).train()
    monkeypatch.setattr(gates, "Machine", ScriptedMachine)  # one without torchao
    events: list[Event] = []
    result = train(llama_dir, tmp_path, observers=[events.append], **RESUMABLE)
    assert result.steps_completed == 9
    told = [event.text for event in events if isinstance(event, Notice) and "FP8" in event.text]
    assert told[-1] == "FP8 cannot be used, training in bf16: torchao is not installed"
    assert len([text for text in told if "cannot" in text]) == 1
