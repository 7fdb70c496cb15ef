"""A real PostgreSQL server of the tests' own: Debian's package, in a temporary folder, on a free port."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def find_programs() -> Path | None:
    """The folder with initdb and postgres; Debian does not put them on the path."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "postgres").exists()), None)


@contextmanager
def running(programs: Path) -> Iterator[str]:
    """The URL of a server that is there until the block ends; it refuses to run as root."""
    as_user: list[str] = []
    with tempfile.TemporaryDirectory(prefix="nacpipe-pg-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            as_user = ["runuser", "-u", "postgres", "--"]
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def run(*command: str) -> None:
            done = subprocess.run([*as_user, *command], cwd="/", capture_output=True, text=True)
            assert done.returncode == 0, (folder / "log").read_text() if (folder / "log").exists() else done.stderr

        data, log = str(folder / "data"), str(folder / "log")
        run(str(programs / "initdb"), "-D", data, "-U", "nac", "-A", "trust", "--no-sync")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        run(str(programs / "pg_ctl"), "-D", data, "-l", log, "-o", options, "-w", "start")
        try:
            yield f"postgresql+psycopg://nac@127.0.0.1:{port}/postgres"
        finally:
            run(str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
