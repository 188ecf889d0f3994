"""What a training changes, saves and tells; with tiny real models and no mock."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.tiny import GPT2, LLAMA, distance, identical, instructions, model_weights, settings
from trainwarden.errors import InvalidSettingError
from trainwarden.events import Evaluated, Event, MetricsLogged, Notice
from trainwarden.train import Trainer, TrainResult
from trainwarden.train.data import collate, micro_batches
from trainwarden.train.encode import encode_rows
from trainwarden.train.jsonl import read_sequence

ROWS = instructions(24)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def train(model: Any, run_dir: Path, **changes: Any) -> TrainResult:
    return Trainer(model, changes.pop("rows", ROWS), output_dir=run_dir, **settings(**changes)).train()


class Seen(list[Event]):
    """An observer that remembers."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]


# -- what is trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_new_model_learns(tmp_path: Path, config: Any) -> None:
    result = train(config, tmp_path, max_steps=25)
    assert result.final_loss < result.first_loss - 1.0
    assert result.best_loss <= result.final_loss
    assert result.first_loss == pytest.approx(math.log(300), abs=1.0)


def test_full_training_moves_every_weight(tmp_path: Path, llama_dir: Path) -> None:
    train(llama_dir, tmp_path / "run")
    before = load_file(llama_dir / "model.safetensors")
    after = model_weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize("directory", ["llama_dir", "gpt2_dir"])
def test_lora_training_saves_adapters_and_leaves_the_base_alone(
    tmp_path: Path, directory: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(directory)
    before = hashes(base)
    result = train(base, tmp_path / "run", mode="lora", lora_rank=4, max_steps=12)
    assert result.final_loss < result.first_loss
    assert hashes(base) == before
    adapter = model_weights(tmp_path / "run")
    assert all("lora_" in name for name in adapter)
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())


def test_lora_with_an_object_trains_its_adapters_and_no_weight_of_its_own(
    tmp_path: Path, llama_dir: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, tmp_path, mode="lora", tokenizer=tokenizer)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_weight_that_the_caller_froze_stays_frozen(tmp_path: Path, llama_dir: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    model.model.embed_tokens.weight.requires_grad_(False)
    train(model, tmp_path, tokenizer=tokenizer)
    name = "model.embed_tokens.weight"
    assert torch.equal(model_weights(tmp_path)[name], load_file(llama_dir / "model.safetensors")[name])


def test_a_prompt_is_not_learned(tmp_path: Path, llama_dir: Path) -> None:
    """Prompts that differ only beyond what the answer can see would change the weights if they were targets."""

    class Labels(Trainer):
        seen: list[Any] = []  # noqa: RUF012 - shared on purpose

        def compute_loss(self, model: Any, batch: Any) -> Any:
            self.seen.append(batch)
            return super().compute_loss(model, batch)

    Labels(llama_dir, ROWS, output_dir=tmp_path, **settings(max_steps=1)).train()
    (batch,) = Labels.seen
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    for labels in batch["labels"]:
        text = tokenizer.decode(labels[labels != -100])
        assert text.removesuffix("<|im_end|>") in {row["output"] for row in ROWS}


# -- one step is one step, however it is cut ---------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "grad_accum_steps"), [(4, 2), (3, 3), (2, 4), (1, 8)])
def test_accumulation_is_the_mean_over_all_targets_of_the_step(
    tmp_path: Path, llama_dir: Path, batch_size: int, grad_accum_steps: int
) -> None:
    rows = ROWS[: batch_size * grad_accum_steps * 2]
    whole = batch_size * grad_accum_steps
    train(llama_dir, tmp_path / "whole", rows=rows, batch_size=whole, max_steps=4)
    train(
        llama_dir,
        tmp_path / "parts",
        rows=rows,
        batch_size=batch_size,
        grad_accum_steps=grad_accum_steps,
        max_steps=4,
    )
    assert distance(model_weights(tmp_path / "parts"), model_weights(tmp_path / "whole")) < 1e-5


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(GPT2, tmp_path / name, seed=seed)  # gpt2 has dropout
    assert identical(model_weights(tmp_path / "a"), model_weights(tmp_path / "b"))
    assert not identical(model_weights(tmp_path / "a"), model_weights(tmp_path / "c"))


# -- evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_is_the_token_mean_and_changes_nothing(tmp_path: Path) -> None:
    seen = Seen()
    held_out = instructions(40)[30:]
    result = train(
        GPT2, tmp_path / "a", eval_dataset=held_out, eval_every_steps=2, batch_size=4, observers=[seen], max_steps=5
    )
    train(GPT2, tmp_path / "b", batch_size=4, max_steps=5)
    assert identical(model_weights(tmp_path / "a"), model_weights(tmp_path / "b"))
    assert [(event.step, event.rows) for event in seen.of(Evaluated)] == [(2, 10), (4, 10), (5, 10)]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    rows = encode_rows(read_sequence(held_out), tokenizer, max_length=64, name="test").rows
    with torch.no_grad():
        whole = model(**collate(rows, pad_token_id=0)).loss
    assert result.eval_loss == pytest.approx(float(whole), rel=1e-5)


def test_rows_for_evaluation_are_drawn_from_the_training_rows(tmp_path: Path) -> None:
    seen = Seen()
    result = train(LLAMA, tmp_path, eval_rows=5, observers=[seen])
    assert [event.rows for event in seen.of(Evaluated)] == [5]
    assert result.eval_loss is not None


def test_without_evaluation_data_there_is_no_evaluation_loss(tmp_path: Path) -> None:
    assert train(LLAMA, tmp_path).eval_loss is None


# -- what is told ------------------------------------------------------------------------------------------------


def test_log_lines_come_when_due_and_agree_with_the_result(tmp_path: Path) -> None:
    seen = Seen()
    result = train(LLAMA, tmp_path, max_steps=7, log_every_steps=3, warmup_steps=2, observers=[seen])
    lines = seen.of(MetricsLogged)
    assert [line.step for line in lines] == [1, 3, 6, 7]
    assert [line.loss for line in lines if line.step in (1, 7)] == [result.first_loss, result.final_loss]
    assert result.best_loss == min(line.loss for line in lines)
    assert lines[0].learning_rate == pytest.approx(1e-2 / 3)
    assert all(line.grad_norm > 0 and line.tokens_per_s > 0 and line.memory_bytes > 0 for line in lines)
    assert all(line.max_steps == 7 and line.steps_skipped == 0 and line.shrinks == 0 for line in lines)


def test_the_result_says_what_happened(tmp_path: Path) -> None:
    result = train(LLAMA, tmp_path / "run", max_steps=3, batch_size=8)
    assert (result.status, result.exit_code) == ("finished", 0)
    assert (result.steps_completed, result.steps_skipped, result.shrinks) == (3, 0, 0)
    assert result.run_id
    assert result.run_dir == str(tmp_path / "run")
    assert result.checkpoint_path == str(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert Path(result.model_path) == tmp_path / "run" / "model"
    assert result.wall_s > 0
    assert (result.peak_memory_bytes or 0) > 2**20
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    rows = encode_rows(read_sequence(ROWS), tokenizer, max_length=64, name="test").rows
    assert result.tokens == sum(len(row.input_ids) for row in rows)  # 3 steps of 8 are one epoch of 24
    assert result.to_dict()["max_temperature_c"] is None


def test_a_result_with_nan_is_still_json(tmp_path: Path) -> None:
    import dataclasses
    import json

    result = dataclasses.replace(train(LLAMA, tmp_path, max_steps=1), final_loss=math.nan)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["final_loss"] == "nan"


def test_automatic_choices_come_with_their_reason(tmp_path: Path) -> None:
    seen = Seen()
    train({**LLAMA, "max_position_embeddings": 40}, tmp_path, max_steps=1, observers=[seen], max_length=50)
    said = " / ".join(str(event) for event in seen.of(Notice))
    assert "device cpu (as asked)" in said
    assert "float32 (a CPU computes float32 fastest" in said
    assert "max_length is 40 instead of 50: the model has no more positions" in said


def test_rows_that_were_cut_or_left_out_are_told(tmp_path: Path) -> None:
    seen = Seen()
    rows = [*ROWS, {"prompt": "red " * 80, "completion": "blue"}, {"text": "green " * 80}]
    train(LLAMA, tmp_path, rows=rows, observers=[seen], max_steps=1)
    said = [str(event) for event in seen.of(Notice)]
    assert any("rows given in memory: 1 of 26 rows were left out" in text for text in said)
    assert any("1 of 26 rows were cut to 64 tokens" in text for text in said)


def test_without_observers_lines_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(LLAMA, tmp_path, max_steps=2, observers=None)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1/2  loss " in captured.err
    assert "warden: device cpu" in captured.err


# -- what is saved -----------------------------------------------------------------------------------------------


def test_a_full_model_loads_with_plain_transformers(tmp_path: Path) -> None:
    train(LLAMA, tmp_path, max_steps=3)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert identical(
        {k: v for k, v in model.state_dict().items() if k in model_weights(tmp_path)}, model_weights(tmp_path)
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"


def test_an_adapter_loads_with_plain_peft_and_gives_the_trained_loss(tmp_path: Path, llama_dir: Path) -> None:
    held_out = instructions(40)[30:]
    result = train(llama_dir, tmp_path, mode="lora", max_steps=8, eval_dataset=held_out)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    rows = encode_rows(
        read_sequence(held_out), AutoTokenizer.from_pretrained(tmp_path / "model"), max_length=64, name="test"
    ).rows
    with torch.no_grad():
        loss = model(**collate(rows, pad_token_id=0)).loss
    assert float(loss) == pytest.approx(result.eval_loss, rel=1e-5)


def test_lora_on_a_new_model_says_it_is_no_use_and_saves_its_base_with_it(tmp_path: Path) -> None:
    seen = Seen()
    held_out = instructions(40)[30:]
    result = train(LLAMA, tmp_path, mode="lora", eval_dataset=held_out, observers=[seen])
    assert any("learns little" in str(event) for event in seen.of(Notice))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "base_model")
    model = PeftModel.from_pretrained(base, tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = encode_rows(read_sequence(held_out), tokenizer, max_length=64, name="test").rows
    with torch.no_grad():
        loss = model(**collate(rows, pad_token_id=0)).loss
    assert float(loss) == pytest.approx(result.eval_loss, rel=1e-5)


def test_checkpoints_of_lora_hold_no_frozen_weight(tmp_path: Path, llama_dir: Path) -> None:
    train(llama_dir, tmp_path, mode="lora")
    (file,) = (tmp_path / "checkpoints" / "step-00000006").glob("model.safetensors")
    assert all("lora_" in name for name in load_file(file))


# -- precision and accelerate --------------------------------------------------------------------------------------


def test_bfloat16_computes_in_it_and_keeps_the_weights_in_float32(tmp_path: Path, llama_dir: Path) -> None:
    class Types(Trainer):
        def compute_loss(self, model: Any, batch: Any) -> Any:
            hidden: list[torch.dtype] = []
            hook = model.model.layers[0].mlp.down_proj.register_forward_hook(
                lambda module, inputs, output: hidden.append(output.dtype)
            )
            loss = super().compute_loss(model, batch)
            hook.remove()
            assert hidden == [torch.bfloat16]
            assert model.lm_head.weight.dtype is torch.float32
            return loss

    result = Types(llama_dir, ROWS, output_dir=tmp_path, **settings(dtype="bfloat16", max_steps=12)).train()
    assert result.final_loss < result.first_loss
    assert {tensor.dtype for tensor in model_weights(tmp_path).values()} == {torch.float32}


def test_lora_keeps_frozen_weights_in_bfloat16_and_adapters_in_float32(tmp_path: Path, llama_dir: Path) -> None:
    held_out = instructions(40)[30:]
    result = train(llama_dir, tmp_path, mode="lora", dtype="bfloat16", max_steps=12, eval_dataset=held_out)
    assert result.final_loss < result.first_loss
    assert {tensor.dtype for tensor in model_weights(tmp_path).values()} == {torch.float32}


def test_trainings_in_one_process_do_not_disturb_each_other(tmp_path: Path, llama_dir: Path) -> None:
    train(llama_dir, tmp_path / "alone", max_steps=3)
    train(llama_dir, tmp_path / "bf16", max_steps=3, dtype="bfloat16")
    train(llama_dir, tmp_path / "after", max_steps=3)
    assert identical(model_weights(tmp_path / "alone"), model_weights(tmp_path / "after"))


def test_an_accelerator_of_another_precision_in_the_same_process_is_named_as_the_obstacle(
    tmp_path: Path, llama_dir: Path, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
    Accelerator(cpu=True)
    train(llama_dir, tmp_path / "same", max_steps=1)
    with pytest.raises(InvalidSettingError, match="Accelerator that this process has made already"):
        train(llama_dir, tmp_path / "other", max_steps=1, dtype="bfloat16")


def test_a_model_object_is_handed_back_without_the_precision_it_was_trained_in(
    tmp_path: Path, llama_dir: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    train(model, tmp_path / "a", tokenizer=tokenizer, dtype="bfloat16", max_steps=1)
    (batch,) = micro_batches(
        encode_rows(read_sequence(ROWS[:2]), tokenizer, max_length=64, name="x").rows,
        micro_batch_size=2,
        pad_token_id=0,
    )
    assert model(**batch, output_hidden_states=True).hidden_states[1].dtype is torch.float32
    train(model, tmp_path / "b", tokenizer=tokenizer, max_steps=1)
