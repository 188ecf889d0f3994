"""The error contract: one class per condition, each with a stable code, an exit status and a page of its own.

::

    WardenError
    ├── InputError                        INPUT_     what was asked for is wrong
    │   ├── UsageError                    INPUT_VALIDATION_FAILED
    │   ├── ConfigNotFoundError           INPUT_CONFIG_NOT_FOUND
    │   ├── RunNotFoundError              INPUT_RUN_NOT_FOUND
    │   ├── UnknownCodeError              INPUT_UNKNOWN_CODE
    │   ├── AdapterNotFoundError          INPUT_ADAPTER_NOT_FOUND
    │   └── DatasetError                  INPUT_DATASET_INVALID
    │       ├── DatasetNotFoundError      INPUT_DATASET_NOT_FOUND
    │       ├── DatasetParseError         INPUT_DATASET_PARSE_FAILED
    │       ├── DatasetValidationError    INPUT_DATASET_VALIDATION_FAILED
    │       └── DatasetFormatError        INPUT_DATASET_FORMAT_UNSUPPORTED
    ├── ConfigError                       CONFIG_    what was configured is wrong
    │   ├── ConfigurationError            CONFIG_INVALID
    │   ├── InvalidSettingError           CONFIG_INVALID_SETTING
    │   └── ResumeMismatchError           CONFIG_RESUME_MISMATCH
    ├── PreflightError                    PREFLIGHT_ a look ahead found that the run cannot succeed
    │   ├── PreflightRefusedError         PREFLIGHT_REFUSED
    │   ├── PreflightMemoryError          PREFLIGHT_MEMORY
    │   ├── PreflightHostMemoryError      PREFLIGHT_HOST_MEMORY
    │   └── UnpredictableModelError       PREFLIGHT_UNPREDICTABLE
    ├── DependencyError                   DEP_       something from outside is missing
    │   ├── ModelLoadError                DEP_MODEL_LOAD_FAILED
    │   ├── GPUNotAvailableError          DEP_GPU_NOT_AVAILABLE
    │   ├── FSDPUnavailableError          DEP_FSDP_UNAVAILABLE
    │   ├── MLXUnavailableError           DEP_MLX_UNAVAILABLE
    │   ├── QuantizationUnavailableError  DEP_QUANTIZATION_UNAVAILABLE
    │   ├── PeftAPIError                  PEFT_API_INCOMPATIBLE
    │   └── RequirementUnmetError         DEP_REQUIREMENT_UNMET
    ├── RunError                          RUNTIME_   the run itself ended early
    │   ├── TrainingError                 RUNTIME_TRAINING_FAILED
    │   ├── TrainingAbortedError          RUNTIME_TRAINING_ABORTED
    │   ├── GPUMemoryError                RUNTIME_GPU_OOM
    │   ├── FullFinetuneModelTooLargeError RUNTIME_FULL_FT_MODEL_TOO_LARGE
    │   ├── RankLostError                 RUNTIME_RANK_LOST
    │   ├── RestartNeededError            RUNTIME_RESTART_NEEDED
    │   ├── SplitRefusedError             RUNTIME_SPLIT_REFUSED
    │   ├── NaNLossError                  RUNTIME_NAN_LOSS
    │   ├── DataLoaderError               RUNTIME_DATALOADER_FAILED
    │   ├── LossSpikeError                RUNTIME_LOSS_SPIKE
    │   ├── CollapseDetectedError         RUNTIME_COLLAPSE_DETECTED
    │   ├── StateNotFiniteError           RUNTIME_STATE_NOT_FINITE
    │   ├── RollbackNeededError           RUNTIME_ROLLBACK_NEEDED
    │   ├── SLAOError                     RUNTIME_SLAO_ERROR
    │   │   ├── SLAOMergeError            RUNTIME_SLAO_MERGE_FAILED
    │   │   └── SLAOMergeDivergedError    SLAO_MERGE_DIVERGED
    │   ├── EvalRegressionError           RUNTIME_EVAL_GATE_REGRESSED
    │   ├── DiskFullError                 RUNTIME_DISK_FULL
    │   ├── FP8UnsupportedError           RUNTIME_FP8_UNSUPPORTED
    │   ├── GPUTemperatureError           RUNTIME_GPU_TEMPERATURE_CRITICAL
    │   ├── GPUMonitoringError            RUNTIME_GPU_MONITORING_FAILED
    │   └── GPUError                      RUNTIME_GPU_ERROR
    ├── StateError                        STATE_     what lies on disk cannot be used
    │   ├── CheckpointError               STATE_CHECKPOINT_INVALID
    │   │   └── SLAOCheckpointError       STATE_SLAO_CHECKPOINT_INVALID
    │   ├── CheckpointNotFoundError       STATE_CHECKPOINT_NOT_FOUND
    │   ├── RunExistsError                STATE_RUN_EXISTS
    │   ├── RunLockedError                STATE_RUN_LOCKED
    │   └── LedgerError                   STATE_LEDGER_INVALID
    ├── PartialError                      PARTIAL_   finished, but not with everything
    │   └── PartialBatchError             PARTIAL_BATCH_OPERATION
    └── InternalError                     INTERNAL_ERROR

Standard library only: an error must be raisable where nothing else works.
"""

from __future__ import annotations

from .base import Retry, WardenError
from .capability import (
    FP8UnsupportedError,
    FSDPUnavailableError,
    MLXUnavailableError,
    QuantizationUnavailableError,
    RequirementUnmetError,
)
from .config import ConfigurationError, InvalidSettingError, ResumeMismatchError
from .dependencies import GPUNotAvailableError, ModelLoadError
from .exits import EXIT_STATUSES
from .explain import (
    describe,
    explain_all_json,
    explain_all_text,
    explain_json,
    explain_markdown,
    explain_text,
    lookup,
)
from .failure import failure_text
from .families import (
    ConfigError,
    DependencyError,
    InputError,
    PartialError,
    PreflightError,
    RunError,
    StateError,
)
from .findings import Finding, Findings, Severity
from .hardware import GPUError, GPUMonitoringError, GPUTemperatureError
from .hook import install_excepthook
from .inputs import (
    ConfigNotFoundError,
    DatasetError,
    DatasetFormatError,
    DatasetNotFoundError,
    DatasetParseError,
    DatasetValidationError,
    RunNotFoundError,
    UnknownCodeError,
    UsageError,
)
from .internal import InternalError
from .memory import (
    FullFinetuneModelTooLargeError,
    PreflightHostMemoryError,
    PreflightMemoryError,
    PreflightRefusedError,
    UnpredictableModelError,
)
from .numbers import CollapseDetectedError, LossSpikeError, RollbackNeededError, StateNotFiniteError
from .partial import EvalRegressionError, PartialBatchError
from .profiles import ExitProfile, exit_status, resolve_profile
from .redaction import dropped_fields, redact, redact_value
from .registry import registry
from .runtime import (
    DataLoaderError,
    DiskFullError,
    GPUMemoryError,
    NaNLossError,
    RankLostError,
    RestartNeededError,
    SplitRefusedError,
    TrainingAbortedError,
    TrainingError,
)
from .slao import (
    AdapterNotFoundError,
    PeftAPIError,
    SLAOCheckpointError,
    SLAOError,
    SLAOMergeDivergedError,
    SLAOMergeError,
)
from .state import (
    CheckpointError,
    CheckpointNotFoundError,
    LedgerError,
    RunExistsError,
    RunLockedError,
)

__all__ = [
    "EXIT_STATUSES",
    "AdapterNotFoundError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CollapseDetectedError",
    "ConfigError",
    "ConfigNotFoundError",
    "ConfigurationError",
    "DataLoaderError",
    "DatasetError",
    "DatasetFormatError",
    "DatasetNotFoundError",
    "DatasetParseError",
    "DatasetValidationError",
    "DependencyError",
    "DiskFullError",
    "EvalRegressionError",
    "ExitProfile",
    "FP8UnsupportedError",
    "FSDPUnavailableError",
    "Finding",
    "Findings",
    "FullFinetuneModelTooLargeError",
    "GPUError",
    "GPUMemoryError",
    "GPUMonitoringError",
    "GPUNotAvailableError",
    "GPUTemperatureError",
    "InputError",
    "InternalError",
    "InvalidSettingError",
    "LedgerError",
    "LossSpikeError",
    "MLXUnavailableError",
    "ModelLoadError",
    "NaNLossError",
    "PartialBatchError",
    "PartialError",
    "PeftAPIError",
    "PreflightError",
    "PreflightHostMemoryError",
    "PreflightMemoryError",
    "PreflightRefusedError",
    "QuantizationUnavailableError",
    "RankLostError",
    "RequirementUnmetError",
    "RestartNeededError",
    "ResumeMismatchError",
    "Retry",
    "RollbackNeededError",
    "RunError",
    "RunExistsError",
    "RunLockedError",
    "RunNotFoundError",
    "SLAOCheckpointError",
    "SLAOError",
    "SLAOMergeDivergedError",
    "SLAOMergeError",
    "Severity",
    "SplitRefusedError",
    "StateError",
    "StateNotFiniteError",
    "TrainingAbortedError",
    "TrainingError",
    "UnknownCodeError",
    "UnpredictableModelError",
    "UsageError",
    "WardenError",
    "describe",
    "dropped_fields",
    "exit_status",
    "explain_all_json",
    "explain_all_text",
    "explain_json",
    "explain_markdown",
    "explain_text",
    "failure_text",
    "install_excepthook",
    "lookup",
    "redact",
    "redact_value",
    "registry",
    "resolve_profile",
]
