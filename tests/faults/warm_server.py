"""The process behind `tests.faults.warm`: imports what is slow once, then forks a child for every request.

The child leaves the loop below and runs its script at the top level of ``__main__``, where an interpreter runs a
script: whatever ends it goes through ``sys.excepthook``, the exit handlers and the interpreter's own way out.
"""

import gc
import json
import os
import random
import signal
import socket
import sys

channel = socket.socket(fileno=int(sys.argv[1]))


def import_what_is_slow() -> None:
    """Torch, trainwarden, and what torch leaves to the first optimizer step (its compiler: 800 modules)."""
    import torch
    from torch.utils.data import DataLoader

    import trainwarden.errors.hook
    import trainwarden.runtime
    import trainwarden.testing  # noqa: F401

    torch.set_num_threads(1)
    random_state = torch.get_rng_state()
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters())
    for batch in DataLoader([torch.ones(2)]):
        layer(batch).sum().backward()
    optimizer.step()
    torch.set_rng_state(random_state)


def next_request() -> tuple[dict, list[int]]:
    """What the forked child is to run, and its standard streams; the parent never returns from here."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1 << 18, 3)
        if not message:  # the tests have ended
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            return json.loads(message), descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        channel.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(script: str, arguments: list[str], environ: dict[str, str], cwd: str, descriptors: list[int]) -> None:
    """Make this child what ``python script arguments`` would be, in a session of its own."""
    os.setsid()
    channel.send(str(os.getpid()).encode())  # not before: from now on a signal to the session finds it
    channel.close()
    # Whoever runs the tests in the background may have started them with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    random.seed()
    sys.argv = [script, *arguments]
    sys.orig_argv = [sys.executable, script, *arguments]
    sys.path[0] = os.path.dirname(script)  # noqa: PTH120 - as the interpreter computes it
    globals()["__file__"] = script


import_what_is_slow()
gc.collect()
gc.freeze()  # a child's collector leaves alone, and thereby uncopied, what all children share
channel.send(b"ready")
request, streams = next_request()
become(**request, descriptors=streams)
with open(request["script"], encoding="utf-8") as source:  # noqa: PTH123
    code = compile(source.read(), request["script"], "exec", dont_inherit=True)
exec(code)
