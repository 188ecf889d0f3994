"""RUNTIME_: the hardware under the run got too hot, failed, or can no longer be watched."""

from __future__ import annotations

from .base import Retry
from .families import RunError


class GPUTemperatureError(
    RunError,
    code="RUNTIME_GPU_TEMPERATURE_CRITICAL",
    exit_code=82,
    http_status=503,
    retry=Retry.AFTER_COOLDOWN,
):
    """A GPU stayed too hot, or reached the temperature at which its hardware slows itself down.

    ## Why this happens
    Near its limit a GPU makes training pause after a checkpoint; it goes on by itself once there is
    enough headroom again. This error means that the pause did not help within `max_pause_s` (also when
    the sensor stopped answering during the pause: what cannot be read is not taken for cool), or that
    two samples in a row were at the slowdown threshold. The usual causes are air flow, a failed fan or
    pump, and neighbours that heat the same air. `device` and `headroom_c` in the details say which GPU
    and how far from its limit.

    ## What to do
    Nothing is lost: a checkpoint was written first. Let the GPU cool, look at fans, filters and the
    room, then resume. If it happens again, lower the power limit (`nvidia-smi -pl`). Where the idle
    temperature leaves little headroom, a smaller `resume_headroom_c` ends a pause sooner.

    ## Example
    ```console
    $ python train.py
    warden: GPU 0 is too hot: 86 °C, 1 °C below its limit, after a pause of 180 s
    $ warden resume calm-otter-41
    ```
    """

    template = "GPU {device} is too hot: {problem}"
    suggestion = "Let the GPU cool and look at its cooling; then resume from the checkpoint."
    device: int
    uuid: str
    temperature_c: float | None
    headroom_c: float | None
    paused_s: float | None
    problem: str


class GPUMonitoringError(
    RunError,
    code="RUNTIME_GPU_MONITORING_FAILED",
    exit_code=69,
    http_status=503,
    retry=Retry.AFTER_CHANGE,
):
    """No GPU sensor can be read, and the run was told not to train without them.

    ## Why this happens
    Only with `on_unreadable="abort"`; the default warns once and trains on, with the hardware unknown.
    There is no NVIDIA driver or no `nvidia-ml-py`, the container may not use NVML, or the driver has
    stopped answering: a GPU that is about to fail often shows nothing but silence.

    ## What to do
    Run `nvidia-smi` in the same place. If it hangs or names a lost GPU, the machine needs a person. If
    it works, install `nvidia-ml-py` where the training runs. In containers, "Unknown Error" after a
    `systemctl daemon-reload` is cured by starting the container again. To train all the same, use
    `on_unreadable="warn"`.

    ## Example
    ```console
    $ python train.py
    warden: the GPU sensors cannot be read: no reading for 26.1 s: nvmlDeviceGetPowerUsage has not returned
    $ nvidia-smi
    ```
    """

    template = "the GPU sensors cannot be read: {problem}"
    suggestion = "Run nvidia-smi in the same place; or allow training without sensors: on_unreadable='warn'."
    device: int | None
    problem: str


class GPUError(
    RunError,
    code="RUNTIME_GPU_ERROR",
    exit_code=82,
    http_status=503,
    retry=Retry.BACKOFF,
):
    """The driver reports that a GPU has failed; what it computes now cannot be trusted.

    ## Why this happens
    `condition` in the details says what was seen: `lost` (fell off the bus), `reset_required`,
    `uncorrectable_ecc` (the counter grew during the run), `row_remap_failed` (no spare rows left),
    `recovery_action` (the driver's own verdict), or `xid` with its number. What was already so when
    the run began is only reported. Unless the driver merely asks to drain the GPU, no checkpoint is
    taken from it: the last verified one stands.

    ## What to do
    `action` in the details: `restart_job`: resume, here or elsewhere; `reset_gpu`: stop what uses the
    GPU and run `nvidia-smi --gpu-reset`; `reboot_node`: reboot the machine; `recover_imex_domain`:
    recover the NVLink domain; `inspect`: look the Xid up in NVIDIA's catalogue; `return_card`: have the
    card replaced, after NVIDIA's field diagnostics. A scheduler should try another machine.

    ## Example
    ```console
    $ python train.py
    warden: GPU 0 has failed: Xid 79: GPU has fallen off the bus
    $ sudo reboot
    ```
    """

    template = "GPU[ {device}] has failed: {problem}"
    suggestion = "Do what `action` in the details says, or use another machine; then resume."
    device: int | None
    uuid: str | None
    condition: str
    action: str
    xid: int | None
    problem: str
