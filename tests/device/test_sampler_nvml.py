"""The sampler over the real binding, in processes of their own: hangs, forks, Xids, lost devices."""

from __future__ import annotations

import os

import pytest

from .stand_in import HOUR_MS, StandIn


def test_a_stall_of_an_hour_delays_no_step_and_is_reported_and_ends_the_process_at_once(machine: StandIn) -> None:
    """A call that waited for the driver would be waited for until the limit of `StandIn.run`."""
    stalled = str(machine.script)
    answer = machine.run(
        f"""
        s = Sampler(period_s=0.1, deadline_s=0.5).start()
        until(lambda: s.latest().sequence)
        with open({stalled!r}, "a") as script:
            script.write("sleep_ms.nvmlDeviceGetPowerUsage={HOUR_MS}\\n")
        until(lambda: getattr(s.latest(), "call", None) == "nvmlDeviceGetPowerUsage")
        silent, thread = s.latest(), s._worker.thread
        ended = s.close(0.2)
        say({{"silent_s": silent.silent_s, "ended": ended, "text": str(silent),
             "stalled": inside(thread, "nvmlDeviceGetPowerUsage")}})
        """
    )
    assert answer["silent_s"] > 0.6, "not before the period and the deadline have passed"
    assert "nvmlDeviceGetPowerUsage has not returned" in answer["text"]
    assert answer["stalled"], "all of this happened during one call of the driver"
    assert answer["ended"] is False


def test_a_driver_that_hangs_at_initialisation_is_silence_too(machine: StandIn) -> None:
    machine.set({"sleep_ms.nvmlInitWithFlags": HOUR_MS})
    answer = machine.run(
        """
        s = Sampler(period_s=0.05, deadline_s=0.2).start()
        until(lambda: getattr(s.latest(), "call", None) == "nvmlInit")
        silent = s.latest()
        say({"call": silent.call, "sequence": silent.last.sequence})
        """
    )
    assert answer == {"call": "nvmlInit", "sequence": 0}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
class TestAfterAFork:
    def test_the_child_samples_with_an_nvml_of_its_own_and_the_parent_goes_on(self, machine: StandIn) -> None:
        answer = machine.run(
            """
            from trainwarden.device import binding

            s = Sampler(period_s=0.02).start()
            until(lambda: s.latest().sequence)
            read_end, write_end = os.pipe()
            child = os.fork()
            if child == 0:
                with binding._lock:  # the thread that this starts comes to its NVML only afterwards
                    first = s.latest()
                until(lambda: s.latest().sequence >= 2)
                reading = s.latest().readings[0]
                os.write(write_end, json.dumps([first.sequence, reading.temperature_c]).encode())
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            before = s.latest().sequence
            until(lambda: s.latest().sequence > before + 1)
            say({"status": status, "child": json.loads(os.read(read_end, 1000)),
                 "parent": s.latest().readings[0].temperature_c, "pids": [os.getpid(), child]})
            """
        )
        assert answer["status"] == 0
        assert answer["child"] == [0, 60.0]
        assert answer["parent"] == 60.0
        initialised = [pid for pid, name in machine.calls() if name == "nvmlInitWithFlags"]
        assert initialised == answer["pids"]

    def test_a_device_of_the_parent_can_be_read_in_the_child(self, machine: StandIn) -> None:
        answer = machine.run(
            """
            (device,) = list_devices().devices
            device.read()
            read_end, write_end = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(write_end, json.dumps(device.read().to_dict()["temperature_c"]).encode())
                os._exit(0)
            os.waitpid(child, 0)
            say(json.loads(os.read(read_end, 1000)))
            """
        )
        assert answer == 60.0

    def test_a_child_that_never_asks_starts_neither_thread_nor_nvml(self, machine: StandIn) -> None:
        answer = machine.run(
            """
            import threading
            s = Sampler(period_s=0.02).start()
            until(lambda: s.latest().sequence)
            child = os.fork()
            if child == 0:
                s.close()
                os._exit(threading.active_count())
            say([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), child])
            """
        )
        assert answer[0] == 1
        assert not [name for pid, name in machine.calls() if pid == answer[1]]


class TestXids:
    def test_79_is_delivered_with_its_device_and_its_action(self, machine: StandIn) -> None:
        machine.set(devices=2)
        script = str(machine.script)
        answer = machine.run(
            f"""
            s = Sampler(period_s=0.02).start()
            until(lambda: s.latest().sequence)
            with open({script!r}, "a") as script:
                script.write("xids=79:1,31:-\\n")
            until(lambda: len(s.latest().xids) == 2)
            say([[x.sequence, x.code, x.index, x.uuid, x.action, str(x)] for x in s.latest().xids])
            """
        )
        assert answer == [
            [1, 79, 1, "GPU-1", "reboot_node", "Xid 79 on GPU 1: GPU has fallen off the bus"],
            [2, 31, None, None, "restart_job", "Xid 31 on an unidentified GPU: GPU memory page fault"],
        ]

    def test_follow_the_numbering_of_torch(self, machine: StandIn) -> None:
        machine.set(devices=2, xids="48:1")
        answer = machine.run(
            """
            s = Sampler(period_s=0.02).start()
            say([[x.code, x.index] for x in until(lambda: s.latest().xids)])
            """,
            CUDA_VISIBLE_DEVICES="1",
        )
        assert answer == [[48, 0]]

    def test_of_a_card_reach_the_mig_part_that_runs_on_it(self, machine: StandIn) -> None:
        machine.set(mig=1, mig_count=2, xids="94:0")
        answer = machine.run(
            """
            s = Sampler(period_s=0.02).start()
            say([[x.code, x.index, x.uuid] for x in until(lambda: s.latest().xids)])
            """,
            CUDA_VISIBLE_DEVICES="MIG-0-1",
        )
        assert answer == [[94, 0, "MIG-0-1"]]

    @pytest.mark.parametrize(
        ("function", "kind"),
        [("nvmlEventSetCreate", "Unsupported"), ("nvmlDeviceRegisterEvents", "Unsupported")],
    )
    def test_that_cannot_be_heard_are_named_by_device(self, machine: StandIn, function: str, kind: str) -> None:
        machine.set({f"err.{function}": 3})
        answer = machine.run(
            """
            s = Sampler(period_s=0.02).start()
            until(lambda: s.latest().sequence)
            say([[u, type(m).__name__, m.reason] for u, m in s.latest().xids_unwatched.items()])
            """
        )
        assert answer == [["GPU-0", kind, f"{function}: Not Supported"]]

    def test_of_a_lost_gpu_stop_and_that_is_said_while_its_readings_say_lost(self, machine: StandIn) -> None:
        script = str(machine.script)
        answer = machine.run(
            f"""
            s = Sampler(period_s=0.02).start()
            until(lambda: s.latest().sequence)
            with open({script!r}, "a") as script:
                script.write("gpu0.err=15\\nerr.nvmlEventSetWait_v2=15\\n")
            until(lambda: s.latest().readings[0].lost and s.latest().xids_unwatched)
            say([str(s.latest().readings[0].temperature_c), list(s.latest().xids_unwatched)])
            """
        )
        assert answer == ["unknown", ["GPU-0"]]


def test_without_a_driver_there_is_one_reason_and_nothing_else(machine: StandIn) -> None:
    answer = machine.run(
        """
        with Sampler(period_s=0.01) as s:
            s._worker.thread.join()  # there is nothing to sample
            say([s.latest().sequence, len(s.latest().readings), s.latest().reason])
        """,
        LD_LIBRARY_PATH="",
    )
    assert answer == [1, 0, "no NVIDIA driver here: its NVML library was not found"]


def test_eight_devices_cost_little(machine: StandIn) -> None:
    """What a reading costs is the calls that it makes; `benchmarks/monitor_cost.py` measures the seconds."""
    machine.set(devices=8)
    calls = machine.run(
        """
        devices = list_devices().devices
        for device in devices:
            device.read()
        log = os.environ["NVML_STUB_LOG"]
        before = len(open(log).readlines())
        for _ in range(20):
            for device in devices:
                device.read()
        say(len(open(log).readlines()) - before)
        """
    )
    assert calls / (20 * 8) <= 9
