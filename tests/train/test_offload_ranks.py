"""Ranks that train together with FSDP2 and CPU offload train what one process trains, and end together.

Each rank is a process; they talk over gloo. A step of two ranks with micro-batches of two rows is a step of one process
with micro-batches of four.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool
from tests.train import offload_ranks
from tests.train.tiny import (
    GPT2,
    LLAMA,
    checkpoint_parts,
    distance,
    identical,
    instructions,
    model_weights,
    settings,
    write_jsonl,
)
from trainwarden.errors import ResumeMismatchError
from trainwarden.train import Trainer

ROWS = instructions(29)
"""Steps of 8: the last one of an epoch is shorter, and one rank has less to do in it."""
TIED = {**LLAMA, "tie_word_embeddings": True}
DROPOUT = {**GPT2, "resid_pdrop": 0.2}
ASKED = {"max_steps": 10, "grad_accum_steps": 2, "seed": 3}


def train_ranks(
    pool: RankPool, model: Any, run_dir: Path, *, faults: dict[str, Any] | None = None, **changes: Any
) -> Any:
    asked = settings(**{**ASKED, "batch_size": 2, **changes})
    return pool.run(offload_ranks.train, model=model, rows=ROWS, output_dir=run_dir, settings=asked, **(faults or {}))


def train_alone(model: Any, run_dir: Path, **changes: Any) -> Any:
    with offload_ranks.gate_open():
        asked = settings(**{**ASKED, "batch_size": 4, "full_ft_offload": True, **changes})
        return Trainer(model, ROWS, output_dir=run_dir, **asked).train()


def test_two_ranks_train_what_one_process_trains_on_all_rows(tmp_path: Path, two_ranks: RankPool) -> None:
    one = train_alone(TIED, tmp_path / "one", eval_rows=4, full_ft_offload=False)
    two = train_ranks(two_ranks, TIED, tmp_path / "two", eval_rows=4)
    assert distance(model_weights(tmp_path / "two"), model_weights(tmp_path / "one")) < 1e-5
    for answer in two:
        assert answer["result"].final_loss == pytest.approx(one.final_loss, rel=1e-5)
        assert answer["result"].eval_loss == pytest.approx(one.eval_loss, rel=1e-5)
        assert answer["result"].tokens == one.tokens
    assert two[0]["losses"] == two[1]["losses"]


def test_rank_0_alone_writes_and_what_it_writes_is_ordinary(tmp_path: Path, two_ranks: RankPool) -> None:
    from transformers import AutoModelForCausalLM

    first, second = train_ranks(two_ranks, LLAMA, tmp_path / "run", max_steps=3)
    assert first["written"]
    assert second["written"] == []
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    parts = checkpoint_parts(tmp_path / "run")
    assert identical(dict(model.state_dict()), parts["model"])
    moments = [value for state in parts["optimizer"]["state"].values() for value in state.values()]
    assert {type(value) for value in (*parts["model"].values(), *moments)} == {torch.Tensor}


def test_ranks_without_a_model_of_their_own_are_given_their_pieces(llama_dir: Path, two_ranks: RankPool) -> None:
    """From a directory; rank 1 never holds a weight that is not its piece."""
    answers = two_ranks.run(offload_ranks.shard_a_model, source=llama_dir)
    assert answers[1]["largest_before"] == 0
    assert answers[0]["whole_equal"]
    assert answers[1]["state_is_none"]
    for answer in answers:
        assert answer["tied"] == answer["tied_before"]
        assert answer["buffers_equal"]


def test_a_model_that_cannot_be_loaded_ends_all_ranks_alike(tmp_path: Path, two_ranks: RankPool) -> None:
    answers = train_ranks(two_ranks, tmp_path / "nowhere", tmp_path / "run")
    assert [answer.code for answer in answers] == ["DEP_MODEL_LOAD_FAILED"] * 2
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_rank_stops_both_and_they_continue_bit_identically(tmp_path: Path, two_ranks: RankPool) -> None:
    train_ranks(two_ranks, DROPOUT, tmp_path / "whole")
    stopped = train_ranks(two_ranks, DROPOUT, tmp_path / "stopped", faults={"signal": (1, 4, signal.SIGTERM)})
    assert [answer.code for answer in stopped] == ["RUNTIME_TRAINING_ABORTED"] * 2
    assert checkpoint_parts(tmp_path / "stopped")["guard"]["steps_completed"] == 4
    train_ranks(two_ranks, DROPOUT, tmp_path / "stopped")
    assert identical(model_weights(tmp_path / "stopped"), model_weights(tmp_path / "whole"))


def test_one_process_continues_what_two_ranks_began(tmp_path: Path, two_ranks: RankPool) -> None:
    train_ranks(two_ranks, LLAMA, tmp_path, faults={"signal": (0, 4, signal.SIGTERM)})
    with pytest.raises(ResumeMismatchError, match="world_size"):
        train_alone(LLAMA, tmp_path, batch_size=2)
    result = train_alone(LLAMA, tmp_path, batch_size=2, accept_changes=["world_size", "loader"])
    assert result.steps_completed == 10


def test_a_loss_that_is_nan_on_one_rank_is_skipped_on_both(tmp_path: Path, two_ranks: RankPool) -> None:
    answers = train_ranks(two_ranks, LLAMA, tmp_path / "run", max_steps=5, faults={"nan": (1, 3)})
    assert [answer["result"].steps_skipped for answer in answers] == [1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in model_weights(tmp_path / "run").values())


@pytest.mark.torture
def test_memory_that_runs_out_on_one_rank_ends_both_and_the_restart_takes_smaller_parts(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    left, failed = train_ranks(two_ranks, LLAMA, tmp_path / "run", checkpoint_every_steps=2, faults={"memory": (1, 4)})
    assert (left.code, failed.code) == ("RUNTIME_RANK_LOST", "RUNTIME_RESTART_NEEDED")
    restarted = train_ranks(two_ranks, LLAMA, tmp_path / "run", checkpoint_every_steps=2)
    assert [answer["result"].steps_completed for answer in restarted] == [10, 10]
    train_alone(LLAMA, tmp_path / "undisturbed")
    assert distance(model_weights(tmp_path / "run"), model_weights(tmp_path / "undisturbed")) < 1e-5


def test_when_a_rank_is_killed_the_other_leaves_with_a_typed_error(tmp_path: Path, two_ranks: RankPool) -> None:
    faults = {"signal": (1, 5, signal.SIGKILL)}
    left, gone = train_ranks(two_ranks, LLAMA, tmp_path / "run", checkpoint_every_steps=2, faults=faults)
    assert gone is None
    assert left.code == "RUNTIME_RANK_LOST"
    assert checkpoint_parts(tmp_path / "run")["guard"]["steps_completed"] == 4


@pytest.mark.torture
@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks_train_what_one_process_trains(tmp_path: Path, world_size: int) -> None:
    pool = RankPool(world_size)
    try:
        train_ranks(pool, LLAMA, tmp_path / "many", batch_size=1)
        train_alone(LLAMA, tmp_path / "one", batch_size=world_size)
        assert distance(model_weights(tmp_path / "many"), model_weights(tmp_path / "one")) < 1e-5
    finally:
        pool.close()


@pytest.mark.torture
def test_torchrun_starts_ranks_that_pass_the_real_gate_and_train_together(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    config.write_text(
        f"""
model:
  mode: full
  config: {json.dumps(LLAMA)}
data: {{train: {tmp_path}/rows.jsonl, max_length: 64}}
trainer: {{max_steps: 10, batch_size: 2, grad_accum_steps: 2, seed: 3, learning_rate: 0.01, device: cpu}}
output_dir: {tmp_path}/two
"""
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    warden = str(Path(sys.executable).with_name("warden"))
    command = [*launcher, warden, "train", str(config), "-o", "trainer.full_ft_offload=true"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400, env=environ)
    assert done.returncode == 0, done.stderr
    train_alone(LLAMA, tmp_path / "one")
    assert distance(model_weights(tmp_path / "two"), model_weights(tmp_path / "one")) < 1e-5
