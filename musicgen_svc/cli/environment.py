"""Installs the environment of requirements.lock, and removes environments that no process uses.

scripts/_env runs this file with the machine's own Python. It therefore needs only the standard library.

    environment.py uv              prints the folder of uv, and installs uv there if it is missing
    environment.py install HASH    makes .venvs/HASH with this Python, and then does what `tidy` does
    environment.py ray HASH        installs requirements-ray.lock into .cache/ray-HASH, for this Python
    environment.py tidy HASH DIR   links .venv to DIR, unless it leads to an environment of HASH already, and
                                   removes environments of other hashes that no process uses

HASH is the start of the sha256 of requirements.lock. An environment cannot be moved, because its programs
contain their own paths. It is therefore made in its final folder. Its file `stamp` is written last, and only
then does .venv lead to it. A script that uses an environment holds a shared lock on its stamp. The process
that removes the environment needs an exclusive lock.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venvs"
LINK = ROOT / ".venv"
CACHE = ROOT / ".cache"
UV_VERSION = "0.13.9"
UV = CACHE / f"uv-{UV_VERSION}"
"""The folder into which uv is installed."""


def say(text: str) -> None:
    """Writes a line to standard error. Standard output is read by scripts/_env."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def install_lock(wait: bool = True) -> Iterator[None]:
    """Context manager: holds the lock without which no process installs or removes an environment.

    uv inherits the lock. If this process is killed, the lock is therefore held until uv has ended.

    Args:
        wait: whether to wait while another process holds the lock.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        OSError: the folder cannot be written to.
    """
    ENVIRONMENTS.mkdir(exist_ok=True)
    with (ENVIRONMENTS / ".lock").open("a") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            say("Another script installs the environment; waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_current(folder: Path, lock_hash: str) -> bool:
    """Whether an environment is complete, and was made from the lock file of this hash."""
    try:
        return (folder / "stamp").read_text().startswith(lock_hash)
    except OSError:
        return False


def runs(folder: Path) -> bool:
    """Whether the environment's Python starts. It does not if the Python that made it was removed."""
    try:
        return subprocess.run([folder / "bin" / "python", "-I", "-S", "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def fetch_uv() -> Path:
    """Returns the folder of uv, and installs it there if it is missing. The caller holds the install lock.

    Raises:
        SystemExit: pip is missing.
        subprocess.CalledProcessError: pip failed, and has printed the reason.
    """
    if (UV / "bin" / "uv").exists():
        return UV
    partial = UV.with_name(f"{UV.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["install", "-qq", "--disable-pip-version-check", "--target", str(partial), f"uv=={UV_VERSION}"]
    _run(_python_with_pip(), "-m", "pip", *options)
    partial.replace(UV)
    return UV


def install_ray(lock_hash: str) -> None:
    """Installs the packages of the Ray extra into a folder, unless another process has done so.

    Folders of other lock files are removed, unless they are in use.

    Args:
        lock_hash: of requirements-ray.lock.

    Raises:
        SystemExit: pip is missing.
        subprocess.CalledProcessError: pip or uv failed, and has printed the reason.
    """
    folder = CACHE / f"ray-{lock_hash}"
    with install_lock():
        if is_current(folder, lock_hash):
            return
        say(f"Installing the Ray extra into {folder.relative_to(ROOT)} (about 0.5 GB, once) ...")
        uv = fetch_uv() / "bin" / "uv"
        for other in CACHE.glob("ray-*"):
            _remove_if_unused(other)
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--quiet", "--no-deps", "--require-hashes", "--python", sys.executable]
        lock_file = ROOT / "requirements-ray.lock"
        _run(uv, "pip", "install", *options, "--target", folder, "--requirements", lock_file)
        (folder / "stamp").write_text(f"{lock_hash}\n")


def _run(*command: str | Path) -> None:
    """Runs a command that inherits the install lock. Its output goes to standard error."""
    subprocess.run(command, stdout=2, check=True, close_fds=False)


def _python_with_pip() -> str:
    """Finds a Python that has pip: this one, or another one on PATH.

    Raises:
        SystemExit: there is none.
    """
    for python in (sys.executable, shutil.which("python3"), shutil.which("python")):
        if python and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            return python
    sys.exit(f"pip is needed to fetch uv, and {sys.executable} has none: install pip for it, and try again.")


def install(lock_hash: str) -> None:
    """Installs the environment of a lock file, unless another process has done so, and tidies.

    Args:
        lock_hash: of the lock file, and the name of the environment.

    Raises:
        SystemExit: the environment is broken and in use, or pip is missing.
        subprocess.CalledProcessError: pip or uv failed, and has printed the reason.
    """
    folder = ENVIRONMENTS / lock_hash
    with install_lock():
        if not (is_current(folder, lock_hash) and runs(folder)):  # otherwise another process has installed it
            with unused(folder) as is_unused:
                if not is_unused:
                    sys.exit(
                        f"The Python of {folder} is gone, and processes still use that folder: stop them, "
                        "and try again."
                    )
                _make(folder)
        _tidy(lock_hash, folder)


def _make(folder: Path) -> None:
    """Makes an environment with this Python, and writes its stamp last."""
    python = f"Python {sys.version.split()[0]} ({sys.executable})"
    say(f"Installing the environment for {python} into {folder.relative_to(ROOT)} (about 6 GB, once) ...")
    uv = fetch_uv() / "bin" / "uv"
    stamp = folder / "stamp"
    stamp.unlink(missing_ok=True)
    _run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder)
    python_here, lock_file = folder / "bin" / "python", ROOT / "requirements.lock"
    _run(uv, "pip", "sync", "--quiet", "--require-hashes", "--python", python_here, lock_file)
    written = stamp.with_name("stamp.partial")
    written.write_text(f"{folder.name} {sys.executable}\n")
    written.replace(stamp)


def _tidy(lock_hash: str, newest: Path) -> None:
    """Links .venv to an environment, and removes those of other lock files that no process uses.

    The caller holds the install lock.

    Args:
        lock_hash: of the present lock file.
        newest: the environment to link to, unless .venv leads to one of this hash already.
    """
    if not is_current(LINK, lock_hash) or not runs(LINK):
        _link(newest)
    for folder in ENVIRONMENTS.iterdir():
        if folder.is_dir() and folder.name != lock_hash:
            _remove_if_unused(folder)


def _link(folder: Path) -> None:
    """Makes .venv a link to an environment, atomically.

    Earlier versions made .venv a folder. Such a folder is removed first if it is unused. Otherwise it stays,
    because scripts/_env finds environments without the link too.
    """
    is_folder = LINK.is_dir() and not LINK.is_symlink()
    if is_folder and not ((LINK / "stamp").exists() and _remove_if_unused(LINK)):
        return
    new = ENVIRONMENTS / ".link"
    new.unlink(missing_ok=True)
    new.symlink_to(folder.relative_to(ROOT))
    new.replace(LINK)


def _remove_if_unused(folder: Path) -> bool:
    """Removes an environment that no process uses. Returns whether it is gone."""
    with unused(folder) as is_unused:
        if is_unused:
            (folder / "stamp").unlink(missing_ok=True)  # first, so that a partly removed one is not used
            shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Context manager: says whether no process uses an environment. If so, none can start to in the block."""
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context((folder / "stamp").open("r+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:  # incomplete, so no script uses it
            pass
        except OSError:  # locked, or of another user, or on a file system without locks
            yield False
            return
        yield not _is_open(folder)


def _is_open(folder: Path) -> bool:
    """Whether a process uses files of a folder or was started from it. True if this cannot be found out.

    Such a process may hold no lock: an editor's, or a server that an earlier version of the scripts started.
    """
    inside = os.fsencode(folder) + b"/"
    if Path("/proc/self/maps").exists():
        for process in Path("/proc").glob("[0-9]*"):
            for file in ("maps", "cmdline"):
                with contextlib.suppress(OSError):  # the process has ended or belongs to another user
                    if inside in (process / file).read_bytes():
                        return True
        return False
    try:
        return inside in subprocess.run(["lsof", "-n", "-P", "-F", "n"], capture_output=True).stdout
    except OSError:
        return True


def main() -> int:
    """Runs the command. Returns the exit status."""
    command, *rest = sys.argv[1:]
    try:
        if command == "uv":
            with install_lock():
                print(fetch_uv())
        elif command == "install":
            install(rest[0])
        elif command == "ray":
            install_ray(rest[0])
        else:
            with install_lock(wait=False):
                _tidy(rest[0], Path(rest[1]))
    except subprocess.CalledProcessError:
        say(
            "The installation failed, for the reason above. Run the script again when that is mended; what "
            "was installed before is still there."
        )
        return 1
    except OSError as error:
        if command != "tidy":  # a later script tidies as well
            say(
                f"{'uv' if command == 'uv' else 'The environment'} cannot be installed: {error.strerror} "
                f"({error.filename}). Run the script once as a user who can write there."
            )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
