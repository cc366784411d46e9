"""A Python that has torch and transformers loaded, from which many short programs are forked: loading takes seconds of each.

`warm_python` starts it and gives a folder for the head of PATH, in which `python` stands for it: `python -m module ...` or
`python file ...` runs in a process of its own with the caller's arguments, environment, folder and streams, is told of Ctrl-C
and SIGTERM as the caller is, and ends with it. Nothing of the project is loaded ahead, so each program sees the code of the
folder it runs in. The first call has everything loaded; where none comes, nothing is.
"""

import array
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY = "ready"
HANDED_ON = (signal.SIGINT, signal.SIGTERM)
_STREAMS = 3


@contextmanager
def warm_python(patience: float) -> Iterator[Path]:
    """Start the warm Python; yields the folder of its `python`. It ends with the context, or with this process.

    A program whose caller is gone is asked to end, and killed after `patience` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="warm-") as scratch:
        place, folder = Path(scratch) / "socket", Path(scratch) / "bin"
        folder.mkdir()
        words = (sys.executable, "-I", "-S", __file__, "call", str(place))
        (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        (folder / "python").chmod(0o755)
        command = [sys.executable, "-I", "-u", __file__, "serve", str(place), str(patience)]
        quiet = {**os.environ, "TQDM_DISABLE": "1"}  # read when it is loaded
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=quiet, start_new_session=True
        ) as server:
            assert server.stdin and server.stdout
            if server.stdout.readline().decode().strip() != READY:
                raise RuntimeError(f"the warm Python did not start; try by hand: {shlex.join(command)}")
            try:
                yield folder
            finally:
                server.stdin.close()  # its sign to end


def serve(place: str, patience: float) -> None:
    """Fork a process for each call, what is slow being loaded before the first, until standard input is closed."""
    attending: list[int] = []  # processes that attend to a call
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print(READY, flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                break
            connection, _ = listener.accept()
            _load()
            attending = [process for process in attending if os.waitpid(process, os.WNOHANG) == (0, 0)]
            attending.append(os.fork())
            if attending[-1] == 0:
                listener.close()
                os._exit(_attend(connection, patience))
            connection.close()
    for process in attending:  # until the last program has ended, so that nothing is left behind
        os.waitpid(process, 0)


def _load() -> None:
    import dvc.repo  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM, PreTrainedModel  # noqa: F401


def _attend(connection: socket.socket, patience: float) -> int:
    """Run one call in a process of its own, hand on signals, and tell its exit code; end it when the caller is gone.

    A caller that had been asked to end and is gone was killed: so is its program, which was asked too.
    """
    size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    first, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(_STREAMS * array.array("i").itemsize))
    streams = array.array("i", ancillary[0][2])
    call = json.loads(first + connection.recv(size - 1, socket.MSG_WAITALL))
    ended, running = os.pipe()  # the program holds `running` for as long as it lives
    program = os.fork()
    if program == 0:
        connection.close()
        os.close(ended)
        _become(call, streams)
    os.close(running)
    for stream in streams:
        os.close(stream)
    asked = False
    while ended not in select.select([connection, ended], [], [])[0]:
        if not (sign := connection.recv(1)):
            _end(program, ended, 0.0 if asked else patience)
            break
        os.kill(program, sign[0])
        asked = True
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    try:
        connection.sendall(code.to_bytes(4, "big", signed=True))
    except OSError:
        return 1
    return 0


def _end(program: int, ended: int, patience: float) -> None:
    if patience:
        os.kill(program, signal.SIGINT)
    if not select.select([ended], [], [], patience)[0]:
        os.kill(program, signal.SIGKILL)


def _become(call: dict[str, Any], streams: "array.array[int]") -> None:
    """Take the caller's streams, folder, environment and arguments, run its program, and end as Python ends after it."""
    import runpy

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    words = call["words"]
    if words[0] == "-m":
        sys.argv, sys.path[0:0] = words[1:], [call["folder"]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0:0] = words, [str(Path(words[0]).parent)]
        runpy.run_path(words[0], run_name="__main__")
    raise SystemExit


def call(place: str, words: list[str]) -> int:
    """Have `-m module ...` or `file ...` run by the warm Python; returns its exit code.

    Ctrl-C and SIGTERM go to the program, which may save before it ends.
    """
    if not words or (words[0].startswith("-") and words[0] != "-m"):
        sys.exit(f"the warm Python runs `-m module ...` or `file ...`, got {shlex.join(words)!r}")
    about = {"folder": os.getcwd(), "environment": dict(os.environ), "words": words}
    message = json.dumps(about).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        connection.sendall(len(message).to_bytes(8, "big"))
        streams = array.array("i", range(_STREAMS))
        connection.sendmsg([message[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(message[1:])
        for sign in HANDED_ON:
            signal.signal(sign, lambda number, _: connection.sendall(bytes([number])))
        reply = connection.recv(4, socket.MSG_WAITALL)
    if len(reply) < 4:
        sys.exit(f"the warm Python ended while this ran: {shlex.join(words)}")
    code = int.from_bytes(reply, "big", signed=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], float(sys.argv[3]))
    else:
        raise SystemExit(call(sys.argv[2], sys.argv[3:]))
