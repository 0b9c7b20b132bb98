"""Ray's workers as forks of a process that has imported what they import.

Most of what a short run costs is imports, the same in every worker. `python -m tests.forking serve
SOCKET` imports them once and forks a worker for each request; `python tests/forking.py SOCKET
SCRIPT ...`, which Ray starts in place of Python, makes the request and lives as long as its worker.
Where nobody answers, it becomes the Python that it stands for.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator

IMPORTED = (
    *("ray._private.workers", "ray.train.v2.api.data_parallel_trainer"),
    *("student_trainer.worker", "student_trainer.run", "teacher_service.service.replicas.actor"),
    *("teacher_service.engine.hf", "transformers.models.llama.modeling_llama"),
)


@contextlib.contextmanager
def forked_workers(folder: str) -> Iterator[dict[str, str]]:
    """The runtime environment of a Ray whose workers are forks, while this `with` lasts."""
    import subprocess

    path = os.path.join(folder, "forking")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    server = subprocess.Popen([sys.executable, "-m", "tests.forking", "serve", path], cwd=root)
    try:
        yield {"py_executable": f"{sys.executable} -S -E {os.path.abspath(__file__)} {path}"}
    finally:
        server.kill()
        server.wait()


def ask(path: str, arguments: list[str]) -> None:
    """Have a worker forked, and end when it ends."""
    asked = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            socket.send_fds(connection, [len(asked).to_bytes(8, "big")], [0, 1, 2])
            connection.sendall(asked)
            worker = int.from_bytes(connection.recv(8), "big")
        except OSError:
            worker = 0
        if not worker:
            os.execv(sys.executable, [sys.executable, *arguments])
        signal.signal(signal.SIGTERM, lambda number, _: os.kill(worker, number))
        connection.recv(1)


def serve(path: str) -> None:
    """Fork a worker for each request, as long as the process that started this one lives."""
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        listener.settimeout(1.0)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(None)
                asked, files = _asked(connection)
                if asked is not None:
                    _import()
                    if os.fork() == 0:
                        listener.close()
                        return _become(connection, *asked, files)
                for file in (connection.detach(), *files):
                    os.close(file)
    return None


def _asked(connection: socket.socket) -> tuple[tuple[list[str], str] | None, list[int]]:
    """Arguments and folder of the process that asks, None where it ended meanwhile, and its
    outputs; its environment is taken over."""
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


def _import() -> None:
    """What workers import, in the environment of the first that asks: Ray reads it on import."""
    import gc

    if "ray" not in sys.modules:
        for module in IMPORTED:
            __import__(module)
        gc.freeze()


def _become(connection: socket.socket, arguments: list[str], folder: str, files: list[int]) -> None:
    """The worker."""
    import random
    import runpy

    import numpy as np

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    random.seed()
    np.random.seed()
    connection.sendall(os.getpid().to_bytes(8, "big"))
    sys.argv = [argument for argument in arguments if argument != "-u"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        ask(sys.argv[1], sys.argv[2:])
