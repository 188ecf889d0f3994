"""Ranks that train together with DDP under the guard train what one process trains, and end together.

Each rank is a process; they talk over gloo. A step of two ranks with micro-batches of two rows is a step of one process
with micro-batches of four.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import RankPool
from tests.train import data_parallel_ranks
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
from trainwarden.errors import InvalidSettingError, RankLostError, ResumeMismatchError
from trainwarden.train import Trainer
from trainwarden.train.precision import choose_precision
from trainwarden.train.processes import data_parallel

ROWS = instructions(29)
"""Steps of 8: the last one of an epoch is shorter, and one rank has less to do in it."""
DROPOUT = {**GPT2, "resid_pdrop": 0.2}
ASKED = {"max_steps": 8, "grad_accum_steps": 2, "seed": 3}
OWN = ("wall_s", "peak_memory_bytes")


def train_ranks(
    pool: RankPool, model: Any, run_dir: Path, *, faults: dict[str, Any] | None = None, **changes: Any
) -> Any:
    asked = settings(**{**ASKED, "batch_size": 2, **changes})
    asked = {"model": model, "rows": ROWS, "output_dir": run_dir, "settings": asked, **(faults or {})}
    return pool.run(data_parallel_ranks.train, **asked)


def train_alone(model: Any, run_dir: Path, **changes: Any) -> Any:
    asked = settings(**{**ASKED, "batch_size": 4, **changes})
    return Trainer(model, ROWS, output_dir=run_dir, **asked).train()


def test_two_ranks_train_what_one_process_trains_on_all_rows(tmp_path: Path, two_ranks: RankPool) -> None:
    one = train_alone(LLAMA, tmp_path / "one", eval_rows=5, eval_every_steps=4)
    two = train_ranks(two_ranks, LLAMA, tmp_path / "two", eval_rows=5, eval_every_steps=4)
    assert distance(model_weights(tmp_path / "two"), model_weights(tmp_path / "one")) < 1e-5
    first, second = two
    assert first["result"] == second["result"]
    assert first["losses"] == second["losses"]
    result = first["result"]
    assert (result.world_size, result.global_batch_size, one.global_batch_size) == (2, 8, 8)
    assert result.tokens == one.tokens
    for name in ("first_loss", "final_loss", "mean_loss", "eval_loss"):
        assert getattr(result, name) == pytest.approx(getattr(one, name), rel=1e-5), name


def test_adapters_are_trained_alike_and_their_weights_begin_alike(tmp_path: Path, two_ranks: RankPool) -> None:
    asked = {"mode": "lora", "max_steps": 4}
    train_alone(LLAMA, tmp_path / "one", **asked)
    train_ranks(two_ranks, LLAMA, tmp_path / "two", **asked)
    assert distance(model_weights(tmp_path / "two"), model_weights(tmp_path / "one")) < 1e-5


def test_rank_0_alone_writes_and_speaks_and_says_what_a_step_takes(
    tmp_path: Path, two_ranks: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = train_ranks(two_ranks, LLAMA, tmp_path / "run", max_steps=2)
    assert first["written"]
    assert second["written"] == []
    assert "a step takes 8 rows: 2 ranks × 2 rows × 2 micro-batches" in first["texts"]
    log = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8")
    assert log.count('"run_finished"') == 1


def test_the_command_speaks_once_for_all_ranks(tmp_path: Path, two_ranks: RankPool) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {{mode: full, config: {json.dumps(LLAMA)}}}
data: {{train: {tmp_path}/rows.jsonl, max_length: 64}}
trainer: {{max_steps: 2, batch_size: 2, device: cpu}}
output_dir: {tmp_path}/run
"""
    )
    first, second = two_ranks.run(data_parallel_ranks.command, arguments=["train", str(config)])
    assert (first[0], second) == (0, (0, "", ""))
    assert "rows a step      4 on 2 ranks" in first[1]
    assert "step 2/2" in first[2]


@pytest.mark.parametrize(("phase", "rank"), [("forward", 1), ("backward", 0)])
def test_memory_that_runs_out_on_one_rank_changes_no_weight(
    tmp_path: Path, two_ranks: RankPool, phase: str, rank: int
) -> None:
    found = train_ranks(two_ranks, LLAMA, tmp_path / "squeezed", faults={"memory": (rank, 4, 1, phase)})
    train_alone(LLAMA, tmp_path / "one")
    assert distance(model_weights(tmp_path / "squeezed"), model_weights(tmp_path / "one")) < 1e-5
    assert found[0]["result"] == found[1]["result"]
    assert found[0]["result"].shrinks >= 1
    assert all("MicroBatchShrunk" in answer["events"] for answer in found)


def test_when_a_row_does_not_fit_on_one_rank_all_end_alike(tmp_path: Path, two_ranks: RankPool) -> None:
    found = train_ranks(two_ranks, LLAMA, tmp_path, faults={"memory": (1, 3, 0, "forward")}, checkpoint_every_steps=1)
    assert [answer.code for answer in found] == ["RUNTIME_GPU_OOM"] * 2
    assert found[0].details == found[1].details
    assert checkpoint_parts(tmp_path)["guard"]["steps_completed"] == 2


def test_a_signal_to_one_rank_stops_both_and_they_continue_bit_identically(tmp_path: Path, two_ranks: RankPool) -> None:
    whole = train_ranks(two_ranks, DROPOUT, tmp_path / "whole")
    stopped = train_ranks(two_ranks, DROPOUT, tmp_path / "stopped", faults={"signal": (1, 4, signal.SIGTERM)})
    assert [answer.code for answer in stopped] == ["RUNTIME_TRAINING_ABORTED"] * 2
    # The vote of step 4 was taken in its backward pass, before the signal came.
    assert checkpoint_parts(tmp_path / "stopped")["guard"]["steps_completed"] == 5
    resumed = train_ranks(two_ranks, DROPOUT, tmp_path / "stopped")
    assert identical(model_weights(tmp_path / "stopped"), model_weights(tmp_path / "whole"))
    assert resumed[1]["result"].final_loss == whole[0]["result"].final_loss
    assert resumed[1]["result"].tokens == whole[0]["result"].tokens


def test_dropout_of_the_ranks_differs(tmp_path: Path, two_ranks: RankPool) -> None:
    """With the same rows and one stream of random numbers, both would drop the same and average nothing."""
    one = {**DROPOUT, "resid_pdrop": 0.0}
    train_ranks(two_ranks, one, tmp_path / "none", max_steps=1)
    train_ranks(two_ranks, DROPOUT, tmp_path / "some", max_steps=1)
    positions = checkpoint_parts(tmp_path / "some")["guard"]["positions"]
    streams = [position["streams"]["global"]["torch"] for position in positions]
    assert not torch.equal(*streams)


def test_one_process_continues_what_two_ranks_began_with_the_same_rows_a_step(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    train_ranks(two_ranks, LLAMA, tmp_path / "run", faults={"signal": (0, 4, signal.SIGTERM)})
    with pytest.raises(ResumeMismatchError, match="world_size"):
        train_alone(LLAMA, tmp_path / "run")
    train_alone(LLAMA, tmp_path / "run", accept_changes=["world_size"])
    train_alone(LLAMA, tmp_path / "one")
    assert distance(model_weights(tmp_path / "run"), model_weights(tmp_path / "one")) < 1e-5


def test_two_ranks_continue_what_one_process_began_with_other_rows_a_step(tmp_path: Path, two_ranks: RankPool) -> None:
    """Half the steps of an epoch lie behind one process: so do half of those of twice the rows for two ranks."""
    train_alone(LLAMA, tmp_path, max_steps=2)
    accepted = ["world_size", "loader", "max_steps"]
    found = train_ranks(two_ranks, LLAMA, tmp_path, batch_size=4, max_steps=4, accept_changes=accepted)
    assert [answer["result"].steps_completed for answer in found] == [4, 4]
    # 2 of 4 batches before; 1 of 2 then, so that 2 more steps end one step into the next epoch.
    position = checkpoint_parts(tmp_path)["guard"]["position"]
    assert (position["epoch"], position["batch_index"]) == (1, 1)


def test_a_loss_that_is_nan_on_one_rank_is_skipped_on_both(tmp_path: Path, two_ranks: RankPool) -> None:
    found = train_ranks(two_ranks, LLAMA, tmp_path / "run", max_steps=5, grad_accum_steps=1, faults={"nan": (1, 3)})
    assert [answer["result"].steps_skipped for answer in found] == [1, 1]
    assert found[0]["result"] == found[1]["result"]
    assert all(torch.isfinite(tensor).all() for tensor in model_weights(tmp_path / "run").values())


def test_evaluation_that_runs_out_of_memory_on_one_rank_has_the_same_outcome(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    asked = {"eval_rows": 6, "max_steps": 2, "grad_accum_steps": 1}
    one = train_alone(LLAMA, tmp_path / "one", **asked)
    found = train_ranks(two_ranks, LLAMA, tmp_path / "two", faults={"evaluation": (1, 1)}, **asked)
    assert [answer["result"].eval_loss for answer in found] == [pytest.approx(one.eval_loss, rel=1e-5)] * 2
    assert ["EvaluationShrunk" in answer["events"] for answer in found] == [False, True]


def test_evaluation_that_cannot_be_done_on_one_rank_ends_both(tmp_path: Path, two_ranks: RankPool) -> None:
    asked = {"eval_rows": 6, "max_steps": 2, "grad_accum_steps": 1}
    found = train_ranks(two_ranks, LLAMA, tmp_path / "two", faults={"evaluation": (1, 0)}, **asked)
    assert [(answer.code, answer.details["phase"]) for answer in found] == [("RUNTIME_GPU_OOM", "evaluation")] * 2


def test_fewer_evaluation_rows_than_ranks_are_evaluated_all_the_same(tmp_path: Path, two_ranks: RankPool) -> None:
    asked = {"eval_rows": 1, "max_steps": 1}
    one = train_alone(LLAMA, tmp_path / "one", **asked)
    found = train_ranks(two_ranks, LLAMA, tmp_path / "two", **asked)
    assert [answer["result"].eval_loss for answer in found] == [pytest.approx(one.eval_loss, rel=1e-5)] * 2


def test_a_model_that_cannot_be_loaded_ends_all_ranks_alike(tmp_path: Path, two_ranks: RankPool) -> None:
    answers = train_ranks(two_ranks, tmp_path / "nowhere", tmp_path / "run")
    assert [answer.code for answer in answers] == ["DEP_MODEL_LOAD_FAILED"] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.torture
def test_a_rank_that_is_killed_ends_the_other_and_both_start_again(tmp_path: Path, two_ranks: RankPool) -> None:
    faults = {"signal": (1, 5, signal.SIGKILL)}
    left, gone = train_ranks(two_ranks, LLAMA, tmp_path / "run", checkpoint_every_steps=2, faults=faults)
    assert gone is None
    assert left.code == "RUNTIME_RANK_LOST"
    train_ranks(two_ranks, LLAMA, tmp_path / "run", checkpoint_every_steps=2)
    train_alone(LLAMA, tmp_path / "one")
    assert distance(model_weights(tmp_path / "run"), model_weights(tmp_path / "one")) < 1e-5


@pytest.mark.parametrize(
    "variables", [{"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}, {"MASTER_PORT": ""}], ids=str
)
def test_what_is_not_data_parallelism_is_refused(two_ranks: RankPool, variables: dict[str, str]) -> None:
    answers = two_ranks.run(data_parallel_ranks.launch_half, **variables)
    assert [answer.kind for answer in answers] == ["InvalidSettingError"] * 2


def test_half_of_a_launchers_variables_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidSettingError, match="WORLD_SIZE"):
        train_alone(LLAMA, tmp_path)
    assert not list(tmp_path.iterdir())


def launched_alone(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_a_launcher_that_starts_one_rank_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_alone(LLAMA, tmp_path / "plain", max_steps=3)
    launched_alone(monkeypatch, 1)
    result = train_alone(LLAMA, tmp_path / "launched", max_steps=3)
    assert result.world_size == 1
    assert identical(model_weights(tmp_path / "launched"), model_weights(tmp_path / "plain"))
    assert not torch.distributed.is_initialized(), "what the training made it has ended"


def test_ranks_that_do_not_come_are_not_waited_for_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    launched_alone(monkeypatch, 2)
    cpu = torch.device("cpu")
    precision = choose_precision("float32", cpu, "full")
    with pytest.raises(RankLostError, match="rank 0 of 2"), data_parallel(cpu, precision, 0, deadline_s=0.2):
        pass


@pytest.mark.torture
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_ranks_that_train_together(tmp_path: Path, launcher: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import json
from trainwarden import Trainer
result = Trainer(
    json.loads('''{json.dumps(LLAMA)}'''), "{tmp_path}/rows.jsonl", mode="full", max_length=64, device="cpu",
    output_dir="{tmp_path}/two", learning_rate=1e-2, batch_size=2, **{ASKED!r}
).train()
assert result.world_size == 2
"""
    )
    starts = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    }
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *starts[launcher], str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400, env=environ)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a step takes 8 rows") == 1
    train_alone(LLAMA, tmp_path / "one")
    assert distance(model_weights(tmp_path / "two"), model_weights(tmp_path / "one")) < 1e-5


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
