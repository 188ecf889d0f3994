"""Models from a directory, from a configuration and with adapters; whatever cannot be loaded says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.tiny import GPT2, LLAMA, corpus
from trainwarden.errors import ConfigurationError, InvalidSettingError, ModelLoadError
from trainwarden.train.hub import Backoff
from trainwarden.train.models import (
    LoraSettings,
    add_lora,
    build_model,
    load_model,
    load_tokenizer,
    tokenizer_for_config,
)

BACKOFF = Backoff(attempts=2, sleep=lambda seconds: None)
LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear")


def load(source: Any) -> Any:
    return load_model(source, dtype=torch.float32, backoff=BACKOFF, say=lambda text: None)


@pytest.fixture
def copied(llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_dir, tmp_path / "copy"))


def test_a_directory_is_loaded_as_it_was_saved(llama_dir: Path) -> None:
    model = load(llama_dir)
    saved = load_file(llama_dir / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())


def test_a_directory_is_loaded_in_the_asked_type(llama_dir: Path) -> None:
    model = load_model(str(llama_dir), dtype=torch.bfloat16, backoff=BACKOFF, say=lambda text: None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("error::FutureWarning")
def test_adapters_are_added_without_a_warning_that_its_reader_cannot_help(llama_dir: Path) -> None:
    assert any("lora_" in name for name, _ in add_lora(load(llama_dir), LORA, base=None).named_parameters())


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere"])
def test_a_missing_directory_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such directory") as caught:
        load(name)
    assert caught.value.details["cause_category"] == "not_found"
    assert caught.value.exit_code == 69


def test_a_file_is_not_a_model_directory(llama_dir: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a file"):
        load(llama_dir / "model.safetensors")


def test_an_empty_directory_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load(tmp_path)
    assert caught.value.details["cause_category"] in ("not_found", "unsupported")


def test_a_hub_name_offline_is_a_network_error_that_is_not_retried() -> None:
    with pytest.raises(ModelLoadError) as caught:
        load("nobody/never-heard-of-this-model")
    assert caught.value.details["cause_category"] in ("network", "not_found")
    assert caught.value.details["attempts"] == 1
    assert "there is no such directory, and from the Hub: " in str(caught.value)


def test_damaged_weights_are_corrupt(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelLoadError) as caught:
        load(copied)
    assert caught.value.details["cause_category"] == "corrupt"


def test_a_damaged_configuration_is_corrupt(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    with pytest.raises(ModelLoadError) as caught:
        load(copied)
    assert caught.value.details["cause_category"] in ("corrupt", "not_found")


def test_missing_weights_are_not_left_random(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lack 1 weights, such as model.layers.1.mlp.up_proj.weight"):
        load(copied)


def test_code_that_comes_with_a_model_is_not_executed(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "bomb.Bomb", "AutoModelForCausalLM": "bomb.Bomb"}
    config["model_type"] = "bomb"
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "bomb.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ModelLoadError):
        load(copied)


def test_an_unknown_architecture_is_unsupported(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "llama9"}))
    with pytest.raises(ModelLoadError) as caught:
        load(copied)
    assert caught.value.details["cause_category"] == "unsupported"


def test_a_directory_without_tokenizer_says_so(copied: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    with pytest.raises(ModelLoadError):
        load_tokenizer(copied, backoff=BACKOFF, say=lambda text: None)


def test_the_tokenizer_of_a_directory_is_the_saved_one(llama_dir: Path, tokenizer: Any) -> None:
    loaded = load_tokenizer(llama_dir, backoff=BACKOFF, say=lambda text: None)
    assert loaded("red green")["input_ids"] == tokenizer("red green")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


# -- new models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_new_model_is_the_seeds(config: Any, tokenizer: Any) -> None:
    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return build_model(config, tokenizer, dtype=torch.float32).state_dict()

    first, same, other = build(1), build(1), build(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_new_model_knows_its_tokenizer(tokenizer: Any) -> None:
    model = build_model({**LLAMA, "vocab_size": 512}, tokenizer, dtype=torch.float32)
    assert model.config.vocab_size == 512
    assert model.config.eos_token_id == tokenizer.eos_token_id
    without = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    assert build_model(without, tokenizer, dtype=torch.float32).config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("model_type", [None, "lama", 7, ["llama"]])
def test_an_unknown_type_is_refused(model_type: Any, tokenizer: Any) -> None:
    with pytest.raises(InvalidSettingError, match="model_type"):
        build_model({"model_type": model_type}, tokenizer, dtype=torch.float32)


def test_an_unknown_key_is_refused_with_the_nearest_one(tokenizer: Any) -> None:
    with pytest.raises(InvalidSettingError, match="closest is hidden_size"):
        build_model({"model_type": "llama", "hiden_size": 32}, tokenizer, dtype=torch.float32)


def test_a_key_may_go_by_its_other_name(tokenizer: Any) -> None:
    model = build_model({**GPT2, "max_position_embeddings": 77}, tokenizer, dtype=torch.float32)
    assert model.config.n_positions == 77


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 30, "num_attention_heads": 4}, {"hidden_size": "wide"}, {"model_type": "t5"}]
)
def test_values_that_do_not_fit_are_a_configuration_error(changes: dict[str, Any], tokenizer: Any) -> None:
    config = {"num_hidden_layers": 1, **changes}
    with pytest.raises(ConfigurationError, match="model.config"):
        build_model({"model_type": "llama", **config}, tokenizer, dtype=torch.float32)


@pytest.mark.parametrize("size", [0, -1, 259, True, "2k", 1.5])
def test_a_vocabulary_below_the_bytes_is_refused(size: Any) -> None:
    with pytest.raises(InvalidSettingError, match="vocab_size"):
        tokenizer_for_config({**LLAMA, "vocab_size": size}, corpus())


def test_a_learned_tokenizer_is_the_datas_and_encodes_anything() -> None:
    first = tokenizer_for_config(LLAMA, corpus())
    again = tokenizer_for_config(LLAMA, corpus())
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert len(first) <= 300
    text = "naïve 日本語 \U0001f600 \x00 tab\t"
    assert first.decode(first(text)["input_ids"]) == text


# -- adapters --------------------------------------------------------------------------------------------------


def test_adapters_are_trainable_in_float32_and_nothing_else(llama_dir: Path) -> None:
    model = load_model(llama_dir, dtype=torch.bfloat16, backoff=BACKOFF, say=lambda text: None)
    adapted = add_lora(model, LORA, base=None)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name and p.dtype is torch.float32 for name, p in trainable.items())


def test_all_linear_leaves_the_head_alone(llama_dir: Path) -> None:
    adapted = add_lora(load(llama_dir), LORA, base=None)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert not [name for name in names if "lm_head" in name]
    assert len([name for name in names if "lora_A" in name]) == 2 * 7


def test_chosen_modules_alone_are_adapted(llama_dir: Path) -> None:
    only = LoraSettings(rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj"])
    adapted = add_lora(load(llama_dir), only, base=None)
    assert len([name for name, p in adapted.named_parameters() if p.requires_grad]) == 2 * 2


def test_modules_that_do_not_exist_are_refused(llama_dir: Path) -> None:
    with pytest.raises(InvalidSettingError, match="lora_target_modules"):
        add_lora(load(llama_dir), LoraSettings(4, 8.0, 0.0, ["nothing_like_it"]), base=None)


def test_a_model_with_adapters_keeps_them(llama_dir: Path) -> None:
    adapted = add_lora(load(llama_dir), LORA, base=None)
    assert add_lora(adapted, LORA, base=None) is adapted
