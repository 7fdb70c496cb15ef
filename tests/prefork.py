"""Python in processes that are forked from one that has imported everything: a start costs a fiftieth of Python's.

`python_words()` stands in for `[sys.executable]` before `-m MODULE` or `-c CODE`: a process of its own with the
streams, folder, environment, umask and signals that it is started with, and whose end is the command's. What a test
says about Python's own start and end or about what a command imports needs the real thing. `torchrun_words()` is
torchrun, whose launcher and ranks are such processes. SIGKILL ends the client; the command gets it a moment later, and
`communicate` waits for the end of both. `kill` and `deadly` end the command first.

As a script this file is the client, and with `serve` the process that forks.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
folder: Path | None = None  # which all workers of a run share; conftest.py says it
# What Python, numba and torch read when they start or are imported: all commands have the server's.
FIXED = ("LC_", "LANG", "PYTHON", "NUMBA_", "OMP_", "MKL_", "ONEDNN_", "TORCH")
FREE = ("PYTHONIOENCODING", "PYTHONPATH", "PYTHONWARNINGS")


def python_words(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the words that run Python in an environment; Python itself where the environment says how it starts."""
    import time

    real = [sys.executable]
    theirs = os.environ if environment is None else environment
    for name in {*theirs, *os.environ}:
        if name.startswith(FIXED) and name not in FREE and theirs.get(name) != os.environ.get(name):
            return real
    if (address := start_server()) is None:
        return real
    deadline = time.monotonic() + 120
    while not address.exists():
        assert time.monotonic() < deadline, "the process that forks commands did not start"
        time.sleep(0.02)
    return [sys.executable, "-I", "-S", __file__, str(address)]


def torchrun_words(
    options: Sequence[str], words: Sequence[str], environment: Mapping[str, str] | None = None
) -> list[str]:
    """Return the words of a torchrun with these options, each of whose ranks runs Python with `words`."""
    python = python_words(environment)
    return [*python, "-m", "torch.distributed.run", *options, "--no-python", *python, *words]


def find_running(words: Sequence[str]) -> list[int]:
    """Return the processes that run Python with `words` and no more, the latest started last."""
    found = []
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                with open(f"/proc/{process}/cmdline", "rb") as file:
                    line = file.read().decode(errors="replace").split("\0")[:-1]
                with open(f"/proc/{process}/stat", "rb") as file:
                    began = int(file.read().rpartition(b")")[2].split()[19])
            except (FileNotFoundError, ProcessLookupError):  # gone meanwhile
                continue
            before = line[: len(line) - len(words)]
            if line[len(before) :] == list(words) and (len(before) == 1 or before[-2:-1] == [__file__]):
                found.append((began, int(process)))
    return [process for _, process in sorted(found)]


def deadly(words: Sequence[str]) -> int:
    """Return the signal at which a command that `python_words()` begins ends by SIGKILL at once."""
    import signal

    return signal.SIGUSR1 if __file__ in words else signal.SIGKILL  # its client knows the process


def kill(process: subprocess.Popen[Any]) -> None:
    """Have a command that `python_words()` began end by SIGKILL at once, and wait for its end."""
    process.send_signal(deadly(process.args))  # type: ignore[arg-type]
    process.wait(60)


def start_server() -> Path | None:
    """Start the process that forks, if no worker of this run has, and return the address that it will listen at.

    None where it cannot be: on a system without pidfds, or in a folder whose name is too long for a socket's.
    """
    from tests.once import once

    if folder is None or not hasattr(os, "pidfd_open") or len(str(folder)) > 80:
        return None
    address = folder / "prefork"

    def start(_: object) -> None:
        owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1)]
        words = [sys.executable, __file__, "serve", str(address), str(owner)]
        os.posix_spawn(
            sys.executable, words, {**os.environ, "PYTHONPATH": ROOT}, file_actions=null, setpgroup=0
        )  # it ends with `owner`

    return once(address, start)


def client(address: str, words: list[str]) -> None:
    """Have a command run with this process's files, folder and environment, and end as it ends."""
    import _socket
    import marshal
    import signal

    files = [number for number in range(3) if _is_open(number)]
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    while connection.fileno() < 3:  # a closed standard stream's number is not for this
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, os.dup(connection.detach()))
    connection.connect(address)
    umask = os.umask(0)
    content = marshal.dumps((words, files, os.getcwdb(), dict(os.environb), umask))
    rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, b"".join(n.to_bytes(4, sys.byteorder) for n in files))
    connection.sendmsg([len(content).to_bytes(4, "big")], [rights] if files else [])
    connection.sendall(content)
    child = 0
    early: list[int] = []

    def forward(number: int, _frame: object) -> None:
        if child:
            os.kill(child, signal.SIGKILL if number == signal.SIGUSR1 else number)
        else:
            early.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, forward)
    child = int.from_bytes(_receive(connection, 4), "big")
    for number in early:
        forward(number, None)
    status = int.from_bytes(_receive(connection, 4), "big")
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:  # which has no handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _receive(connection, size: int) -> bytes:  # type: ignore[no-untyped-def]
    content = b""
    while len(content) < size:
        more = connection.recv(size - len(content))
        if not more:
            os._exit(70)
        content += more
    return content


def serve(address: str, owner: int) -> None:
    """Fork a process for every client until the process `owner` has ended. A forked one returns, to run its command."""
    import contextlib
    import gc
    import marshal
    import selectors
    import signal
    import socket

    _import_all()
    gc.collect()
    gc.freeze()  # no collection in a forked process touches, and so copies, what is shared
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.draft")
    listener.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ, ("listener", 0, None))
    waiting.register(os.pidfd_open(owner), selectors.EVENT_READ, ("owner", 0, None))
    os.rename(f"{address}.draft", address)
    while True:
        for key, _ in waiting.select():
            kind, child, connection = key.data
            if kind == "owner":
                os._exit(0)
            elif kind == "client":  # it was killed
                waiting.unregister(key.fileobj)
                os.kill(child, signal.SIGKILL)
            elif kind == "child":
                waiting.unregister(key.fd)
                os.close(key.fd)
                status = os.waitpid(child, 0)[1]
                if connection in waiting.get_map():
                    waiting.unregister(connection)
                with contextlib.suppress(OSError):  # the client was killed
                    connection.sendall(status.to_bytes(4, "big"))
                connection.close()
            else:
                connection, _ = listener.accept()
                head, files, _, _ = socket.recv_fds(connection, 4, 3)
                words, numbers, folder, environment, umask = marshal.loads(
                    _receive(connection, int.from_bytes(head, "big"))
                )
                if child := os.fork():
                    for file in files:
                        os.close(file)
                    connection.sendall(child.to_bytes(4, "big"))
                    waiting.register(connection, selectors.EVENT_READ, ("client", child, None))
                    waiting.register(os.pidfd_open(child), selectors.EVENT_READ, ("child", child, connection))
                    continue
                for inherited in (waiting, listener, connection):
                    inherited.close()
                _become(words, dict(zip(numbers, files, strict=True)), folder, environment, umask)
                return


def _import_all() -> None:
    """Import what commands import when they run, but start no thread: none survives a fork."""
    import contextlib
    import importlib
    import pkgutil

    import matplotlib

    import nacpipe

    matplotlib.use("agg")
    for module in pkgutil.walk_packages(nacpipe.__path__, "nacpipe."):
        if module.name != "nacpipe.__main__":
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    for name in ("torch", "torchvision", "torchvision.transforms.v2", "optuna", "pandas", "PIL.Image",
                 "optuna.storages.journal", "scipy.stats", "click.testing"):  # fmt: skip
        importlib.import_module(name)


def _become(words, files, folder, environment, umask) -> None:  # type: ignore[no-untyped-def]
    """Make this process what the client was started as."""
    theirs = {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()}
    for number in range(3):
        os.close(number)
    for number, file in files.items():
        os.dup2(file, number)
    os.closerange(3, 65536)
    os.environ.clear()
    os.environ.update(theirs)
    os.chdir(folder)
    os.umask(umask)
    encoding, _, errors = theirs.get("PYTHONIOENCODING", "").partition(":")
    sys.stdin = _stream(0, "r", encoding, errors)
    sys.stdout = _stream(1, "w", encoding, errors)
    sys.stderr = _stream(2, "w", encoding, "backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv = words


def _stream(number: int, mode: str, encoding: str, errors: str):  # type: ignore[no-untyped-def]
    if not _is_open(number):
        return None
    stream = open(number, mode, encoding=encoding or None, errors=errors or None, closefd=False)  # noqa: SIM115
    if mode == "w":
        stream.reconfigure(line_buffering=number == 2 or stream.isatty())
    return stream


def _run_command() -> int:
    import runpy

    kind, what, *words = sys.argv
    try:
        if kind == "-m":
            sys.argv = [what, *words]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *words]
            exec(what, {"__name__": "__main__"})
        else:
            raise ValueError(f"{kind}: only -m MODULE and -c CODE are known here")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(code: int) -> None:
    """End as Python does, but leave the memory, which is shared, as it is: freeing it would copy it first."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = 120
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
        _end(_run_command())
    else:
        client(sys.argv[1], sys.argv[2:])
