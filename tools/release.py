"""Build sdist and wheel, install the wheel where this checkout is not, and run the demo from it.

    python tools/release.py --output dist --workspace build/release

The wheel is built from the unpacked sdist, so a file that the sdist lacks is missing in the wheel too. The new
environment sees this one's packages by a .pth file, which does not lead to this checkout: an editable install's own
.pth is not read there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
WANTED = (  # files that are no modules
    "nacpipe/py.typed",
    "nacpipe/evaluation/published_results.csv",
    "nacpipe/networks/architectures/digits_cnn.safetensors",
    "nacpipe/reporting/report.html.j2",
)
# What is not ours to ship: sources are built where neither build/ nor an egg-info of this checkout is.
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "site", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.zarr"
)


def build(kind: str, source: Path, output: Path) -> Path:
    """Run a hook of setuptools in a source tree and return the file that it wrote."""
    command = [sys.executable, "-c", BUILD, kind, str(output)]
    done = subprocess.run(command, cwd=source, check=True, text=True, stdout=subprocess.PIPE)
    return output / done.stdout.splitlines()[-1]


def build_both(output: Path, workspace: Path) -> tuple[Path, Path]:
    """Build the sdist from a copy of this checkout, and the wheel from the unpacked sdist."""
    output.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT, workspace / "source", ignore=IGNORED)
    sdist = build("build_sdist", workspace / "source", output)
    with tarfile.open(sdist) as archive:
        archive.extractall(workspace / "unpacked", filter="data")
    return sdist, build("build_wheel", workspace / "unpacked" / sdist.name.removesuffix(".tar.gz"), output)


def install(wheel: Path, environment: Path) -> Path:
    """Install a wheel without its dependencies into a new environment that sees this one's; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    folder = subprocess.run(where, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()
    Path(folder, "packages_of_the_builder.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Where sdist and wheel go.")
@click.option("--workspace", type=click.Path(path_type=Path), required=True, help="A folder that is made anew.")
def main(output: Path, workspace: Path) -> None:
    """Build, install and run; exit code 1 where something is missing."""
    shutil.rmtree(workspace, ignore_errors=True)
    workspace = workspace.resolve()
    workspace.mkdir(parents=True)
    sdist, wheel = build_both(output.resolve(), workspace)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nacpipe").rglob("*.py")}
    if missing := sorted({*modules, *WANTED} - names):
        raise click.ClickException(f"{wheel.name} lacks {', '.join(missing)}: name its package in pyproject.toml")
    python = install(wheel, workspace / "environment")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (workspace / "empty").mkdir()

    def run(*words: str) -> str:
        command = [str(python), *words]
        done = subprocess.run(
            command, cwd=workspace / "empty", env=environment, check=True, text=True, stdout=subprocess.PIPE
        )
        return done.stdout

    place = Path(run("-c", "import nacpipe; print(nacpipe.__file__)").strip())
    if workspace not in place.parents:
        raise click.ClickException(f"nacpipe was imported from {place}, not from the wheel")
    table = run("-m", "nacpipe", "run", "digits")
    if "NAC is " not in table:
        raise click.ClickException("nacpipe run digits did not end with NAC's place")
    click.echo(f"{sdist.name} and {wheel.name}: installed, ran digits")


if __name__ == "__main__":
    main()
