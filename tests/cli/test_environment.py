"""scripts/_env and cli/environment.py: environments lie side by side, and none is removed while it is used.

`uv` is replaced by a script that makes an environment of one link to this test's own Python. The script never
deletes anything, and refuses every folder that is not in the test's own checkout.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.repository import ROOT

BASE = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
UV = """#!/usr/bin/env bash
set -eu
echo "$*" >>"$CHECKOUT/uv.log"
[ ! -e "$CHECKOUT/offline" ] || { echo "no network" >&2; exit 2; }
python= folder=
while [ $# -gt 0 ]; do
    case $1 in --python) python=$2; shift ;; */.venvs/*) folder=$1 ;; esac
    shift
done
[ -n "$folder" ] || exit 0
case $folder in "$CHECKOUT"/.venvs/*) ;; *) exit 9 ;; esac
mkdir -p "$folder/bin"
[ -e "$folder/bin/python" ] || ln -s "$python" "$folder/bin/python"
"""
SHOW = """source "$0/scripts/_env"; environment; echo "$PYTHON"; eval "${1:-}" """


class Checkout:
    """A checkout with the real scripts, a lock file that a test may change, and the stand-in for uv."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir(parents=True)
        (folder / "musicgen_svc" / "cli").mkdir(parents=True)
        for name in ("scripts/_env", "musicgen_svc/cli/environment.py"):
            shutil.copy(ROOT / name, folder / name)
        self.lock("first")
        uv = folder / ".cache" / f"uv-{self._uv_version()}" / "bin" / "uv"
        uv.parent.mkdir(parents=True)
        uv.write_text(UV)
        uv.chmod(0o755)

    def _uv_version(self) -> str:
        text = (self.folder / "musicgen_svc" / "cli" / "environment.py").read_text()
        return text.split('UV_VERSION = "')[1].split('"')[0]

    def lock(self, content: str) -> None:
        (self.folder / "requirements.lock").write_text(content)

    def start(self, then: str = "", **variables: str) -> "subprocess.Popen[str]":
        """Starts a script that prepares the environment, prints its Python, and runs `then`."""
        own = {"PATH": f"{Path(BASE).parent}:{os.environ['PATH']}", "HOME": os.fspath(self.folder)}
        return subprocess.Popen(
            ["bash", "-euc", SHOW, self.folder, then],
            env={**own, "CHECKOUT": os.fspath(self.folder), "MUSICGEN_PYTHON": BASE, **variables},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, **variables: str) -> tuple[int, str, str]:
        """Runs such a script. Returns its exit status, the environment's name and standard error."""
        process = self.start(**variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, Path(out.strip() or "/none/bin/python").parents[1].name, err

    @contextlib.contextmanager
    def running(self, **variables: str) -> Iterator[Path]:
        """Context manager: a program runs in the environment. Gives the environment's folder."""
        process = self.start('exec "$PYTHON" -c "input()"', **variables)
        assert process.stdout
        try:
            yield Path(process.stdout.readline().strip()).parents[1]
        finally:
            process.communicate("\n", timeout=60)
        assert process.returncode == 0

    def names(self) -> list[str]:
        """Names of all environments, complete or not."""
        return sorted(path.name for path in (self.folder / ".venvs").iterdir() if path.is_dir())

    def calls(self) -> list[str]:
        """Arguments of each call of uv."""
        log = self.folder / "uv.log"
        return log.read_text().splitlines() if log.exists() else []

    def state(self) -> list[tuple[str, int]]:
        """Every path in the checkout, and when it was last written."""
        paths = [self.folder, *self.folder.rglob("*")]
        return sorted((os.fspath(path), path.lstat().st_mtime_ns) for path in paths)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout whose path has a space."""
    return Checkout(tmp_path / "check out")


def test_an_environment_is_installed_once_and_then_nothing_is_written(checkout: Checkout) -> None:
    status, name, err = checkout.run()
    assert status == 0, err
    assert (checkout.folder / ".venv").resolve().name == name != "bin"
    assert f"Installing the environment for Python {sys.version.split()[0]}" in err
    assert len(checkout.calls()) == 2
    before = checkout.state()
    assert checkout.run()[:2] == (0, name)
    assert checkout.state() == before


def test_the_ray_extra_is_installed_beside_the_environment_only_when_it_is_asked_for(
    checkout: Checkout,
) -> None:
    (checkout.folder / "requirements-ray.lock").write_text("ray")
    shown = {}
    for how in ("", "install", "install", ""):
        process = checkout.start(f'ray_packages {how}; echo "$PYTHONPATH"')
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        shown[len(checkout.calls())] = out.splitlines()[-1]
    (folder,) = (checkout.folder / ".cache").glob("ray-*")
    assert shown == {2: os.fspath(checkout.folder), 3: f"{checkout.folder}:{folder}"}
    assert "--require-hashes" in checkout.calls()[-1] and f"--target {folder}" in checkout.calls()[-1]


def test_scripts_that_start_at_once_install_once(checkout: Checkout) -> None:
    started = [checkout.start() for _ in range(4)]
    ended = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 4, ended
    assert len({out for out, _ in ended}) == 1
    assert len(checkout.calls()) == 2


def test_another_python_on_the_path_changes_nothing(checkout: Checkout, tmp_path: Path) -> None:
    checkout.run()
    (tmp_path / "bin").mkdir()
    for name in ("python3.12", "python3.11", "python3", "python"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    before = checkout.state()
    status, _, err = checkout.run(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", MUSICGEN_PYTHON="")
    assert (status, checkout.state()) == (0, before), err


def test_a_new_lock_file_gets_an_environment_of_its_own_and_the_old_one_goes_when_it_is_free(
    checkout: Checkout,
) -> None:
    with checkout.running() as old:
        checkout.lock("second")
        status, new, err = checkout.run()
        assert status == 0, err
        assert checkout.names() == sorted([old.name, new])
        assert (checkout.folder / ".venv").resolve().name == new
        assert (old / "bin" / "python").exists()
        with (old / "stamp").open() as stamp, pytest.raises(BlockingIOError):
            fcntl.flock(stamp, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the program itself holds it
    assert checkout.run()[0] == 0
    assert checkout.names() == [new]


def test_a_failed_installation_leaves_what_was_there(checkout: Checkout) -> None:
    _, old, _ = checkout.run()
    checkout.lock("second")
    (checkout.folder / "offline").touch()
    status, _, err = checkout.run()
    assert status == 1
    assert err.splitlines()[-2:] == [
        "no network",
        "The installation failed, for the reason above. Run the script again when that is mended; what "
        "was installed before is still there.",
    ]
    assert (checkout.folder / ".venv").resolve().name == old
    checkout.lock("first")
    assert checkout.run()[:2] == (0, old)


def test_half_an_environment_is_never_used(checkout: Checkout) -> None:
    _, name, _ = checkout.run()
    (checkout.folder / ".venvs" / name / "stamp").unlink()
    assert checkout.run()[:2] == (0, name)
    assert len(checkout.calls()) == 4


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="finds processes in /proc")
def test_a_process_without_a_lock_keeps_its_environment_too(checkout: Checkout) -> None:
    """An editor's Python, or a server that an earlier version of the scripts has started."""
    _, name, _ = checkout.run()
    python = checkout.folder / ".venvs" / name / "bin" / "python"
    process = subprocess.Popen([python, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1, text=True)
    assert process.stdout
    process.stdout.readline()
    checkout.lock("second")
    checkout.run()
    assert python.exists()
    process.communicate("\n", timeout=60)
    checkout.run()
    assert not python.exists()


def old_layout(checkout: Checkout, lock_hash: str) -> Path:
    """Makes .venv as a folder, as earlier versions did."""
    folder = checkout.folder / ".venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(BASE)
    (folder / "stamp").write_text(f"{lock_hash} {BASE}\n")
    return folder


def first_hash(checkout: Checkout) -> str:
    """The hash of the lock file."""
    shown = subprocess.run(
        ["bash", "-euc", 'source "$0/scripts/_env"; lock_hash requirements.lock', checkout.folder],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return shown.stdout.strip()


def test_a_folder_of_an_earlier_version_is_used_as_it_is(checkout: Checkout) -> None:
    folder = old_layout(checkout, first_hash(checkout) + "0" * 48)
    before = checkout.state()
    assert checkout.run()[:2] == (0, ".venv")
    assert checkout.state() == before and not folder.is_symlink()


def test_a_folder_of_an_earlier_version_becomes_a_link_once_nobody_uses_it(checkout: Checkout) -> None:
    folder = old_layout(checkout, "0" * 64)
    with (folder / "stamp").open() as stamp:
        fcntl.flock(stamp, fcntl.LOCK_SH)
        status, name, err = checkout.run()
        assert status == 0, err
        assert not folder.is_symlink() and (folder / "bin" / "python").exists()
    assert checkout.run()[:2] == (0, name)
    assert folder.is_symlink() and folder.resolve().name == name


def test_a_folder_that_no_script_made_is_left_alone(checkout: Checkout) -> None:
    (checkout.folder / ".venv").mkdir()
    (checkout.folder / ".venv" / "mine").touch()
    assert checkout.run()[0] == 0
    before = checkout.state()
    assert checkout.run()[0] == 0
    assert checkout.state() == before and (checkout.folder / ".venv" / "mine").exists()


def test_a_link_to_elsewhere_is_switched_and_what_it_led_to_stays(checkout: Checkout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "stamp").write_text("0" * 64)
    (checkout.folder / ".venv").symlink_to(elsewhere)
    _, name, _ = checkout.run()
    assert (checkout.folder / ".venv").resolve().name == name
    assert (elsewhere / "stamp").exists()


def test_a_named_python_that_cannot_be_used_is_one_sentence(checkout: Checkout) -> None:
    status, _, err = checkout.run(MUSICGEN_PYTHON="no-such-python")
    assert (status, err) == (
        1,
        "MUSICGEN_PYTHON is 'no-such-python', which does not run as Python 3.12: name one that does, "
        "or unset it.\n",
    )


def test_a_checkout_that_cannot_be_written_to_is_one_sentence(checkout: Checkout) -> None:
    (checkout.folder / ".venvs").touch()  # no folder can be made there, whoever asks
    status, _, err = checkout.run()
    assert status == 1
    assert err.startswith("The environment cannot be installed: ") and err.count("\n") == 1
    assert err.endswith("Run the script once as a user who can write there.\n")


def test_python_3_12_is_found_behind_pyenvs_failing_command_and_another_version_is_not_taken(
    checkout: Checkout, tmp_path: Path
) -> None:
    home = tmp_path / "pyenv"
    for path, script in {
        home / "versions" / "3.12.1" / "bin" / "python": f"echo {home}/versions/3.12.1/bin/python",
        tmp_path / "bin" / "python3.12": "echo 'pyenv: command not found' >&2\nexit 127",
        tmp_path / "bin" / "python3": "exit 1  # another version",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    for name in ("bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)

    def find(**variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", "-euc", 'source "$0/scripts/_env"; find_python; echo "$PYTHON"', checkout.folder],
            env={"PATH": os.fspath(tmp_path / "bin"), "HOME": os.fspath(tmp_path), **variables},
            capture_output=True, text=True,
        )  # fmt: skip

    assert find(PYENV_ROOT=os.fspath(home)).stdout == f"{home}/versions/3.12.1/bin/python\n"
    without = find()
    assert without.returncode == 1
    assert without.stderr.startswith("Python 3.12 is needed: none was found, and none could be fetched.")


SCRIPTS = [
    "predict", "serve", "test", "check", "schema", "download_weights", "lock", "train_demo", "gpu_check",
    "bench", "bench_demo", "bench_live", "bench_load", "bench_serving", "soak", "batch", "ray",
]  # fmt: skip


def test_every_script_is_tested_through_links() -> None:
    assert sorted(SCRIPTS) == sorted(
        path.name for path in (ROOT / "scripts").iterdir() if os.access(path, os.X_OK) and path.is_file()
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_works_through_links_to_links(script: str, tmp_path: Path) -> None:
    """The checkout's `_env` ends the script, and shows where it was found from."""
    scripts = tmp_path / "check out" / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / script, scripts)
    (scripts / "_env").write_text('echo "${BASH_SOURCE[0]}"; exit 7\n')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "absolute").symlink_to(scripts / script)
    (tmp_path / "relative").symlink_to(Path("bin") / "absolute")
    (tmp_path / "there").symlink_to(tmp_path / "relative")
    ended = subprocess.run(
        ["there"], executable=tmp_path / "there", cwd="/", env={"PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 7, ended.stderr
    assert Path(ended.stdout.strip()).resolve() == scripts / "_env"
