"""Processes as forks of one that has imported what they import, once for a whole run of tests.

Most of what a short process costs is imports, the same every time. `python -m tests.forking serve
SOCKET KIND` imports what a kind of process needs when the first is asked for, and forks each from
itself; `python tests/forking.py SOCKET SCRIPT ...`, started in place of Python, makes the request
and lives as long as its fork. Where nobody answers, it becomes the Python that it stands for.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator

HERE = os.path.abspath(__file__)
SOCKETS = "TESTS_FORKING"  # the variable with the folder of the sockets
LLAMA = "transformers.models.llama.modeling_llama"
IMPORTED = {
    "ray": (
        *("ray._private.workers", "ray.train.v2.api.data_parallel_trainer"),
        *(
            "student_trainer.worker",
            "student_trainer.run",
            "teacher_service.service.replicas.actor",
        ),
        *("teacher_service.engine.hf", LLAMA),
    ),
    "ranks": ("tests.student_trainer.jobs", "peft", LLAMA),
    # What loads an export, without any of our code.
    "plain": ("torch", "transformers.models.auto.tokenization_auto", "peft", LLAMA),
}


@contextlib.contextmanager
def serving(folder: str) -> Iterator[None]:
    """Have processes of every kind forked for this process and those below it, in a `with`."""
    import subprocess

    root, servers = os.path.dirname(os.path.dirname(HERE)), []
    for kind in IMPORTED:
        # A script under `-I` finds no package beside it.
        script = ["-I", HERE] if kind == "plain" else ["-m", "tests.forking"]
        command = [sys.executable, *script, "serve", os.path.join(folder, kind), kind]
        servers.append(subprocess.Popen(command, cwd=root))
    os.environ[SOCKETS] = folder
    try:
        yield
    finally:
        del os.environ[SOCKETS]
        for server in servers:
            server.kill()
            server.wait()


def python(kind: str) -> list[str]:
    """What to start in place of `python`: a new one where nothing is served."""
    folder = os.environ.get(SOCKETS)
    asking = [] if folder is None else ["-S", "-E", HERE, os.path.join(folder, kind)]
    return [sys.executable, *asking]


def reload_in_forks() -> None:
    """Let the exports of this process be loaded by forks."""
    from student_trainer.state import export

    if SOCKETS in os.environ:
        export.FRESH = (*python("plain"), export.FRESH[-1])


def ask(path: str, arguments: list[str]) -> int:
    """Have a process forked, and end when it ends, with what it ends with."""
    asked = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            socket.send_fds(connection, [len(asked).to_bytes(8, "big")], [0, 1, 2])
            connection.sendall(asked)
            fork = int.from_bytes(connection.recv(8), "big")
        except OSError:
            fork = 0
        if not fork:
            isolated = ["-I"] * (os.path.basename(path) == "plain")
            os.execv(sys.executable, [sys.executable, *isolated, *arguments])
        signal.signal(signal.SIGTERM, lambda number, _: os.kill(fork, number))
        status = connection.recv(1)
        connection.recv(1)
    return status[0] if status else 1  # it was killed


def serve(path: str, kind: str) -> None:
    """Fork a process for each request, as long as the process that started this one lives."""
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        listener.settimeout(1.0)
        while os.getppid() == parent:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(None)
            asked, files = _asked(connection)
            if asked is not None:
                _import(kind)
                if os.fork() == 0:
                    listener.close()
                    return _become(connection, *asked, files)
            for file in (connection.detach(), *files):
                os.close(file)
    return None


def _asked(connection: socket.socket) -> tuple[tuple[list[str], str] | None, list[int]]:
    """Arguments and folder of the process that asks, None where it ended meanwhile, and its
    inputs and outputs; its environment is taken over."""
    size, files, *_ = socket.recv_fds(connection, 8, 3)
    asked = b""
    while len(asked) < int.from_bytes(size, "big") and (more := connection.recv(1 << 16)):
        asked += more
    if not size or len(asked) < int.from_bytes(size, "big"):
        return None, files
    arguments, environment, folder = json.loads(asked)
    os.environ.clear()
    os.environ.update(environment)
    return (arguments, folder), files


def _import(kind: str) -> None:
    """What a kind imports, in the environment of the first that asks: Ray reads it on import."""
    import gc

    if "torch" not in sys.modules:
        for module in IMPORTED[kind]:
            __import__(module)
        if kind != "plain":
            reload_in_forks()
        gc.freeze()


def _become(connection: socket.socket, arguments: list[str], folder: str, files: list[int]) -> None:
    """The process that was asked for; it says what it ends with."""
    import random

    import numpy as np

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    random.seed()
    np.random.seed()
    connection.sendall(os.getpid().to_bytes(8, "big"))
    status = 1
    try:
        _run([argument for argument in arguments if argument != "-u"])
        status = 0
    except SystemExit as end:
        status = (end.code if isinstance(end.code, int) else 1) if end.code else 0
        raise
    finally:
        with contextlib.suppress(OSError):
            connection.sendall(bytes([status & 255]))
            sys.stdout.flush()


def _run(arguments: list[str]) -> None:
    """What Python would run with these arguments: a script, or a module after `-m`."""
    import runpy

    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        if not sys.flags.isolated:
            sys.path[0] = os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
