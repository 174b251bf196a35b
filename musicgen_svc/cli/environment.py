"""Installs the environment of requirements.lock beside those that are there, and removes what nobody uses.

Run by scripts/_env with the machine's own Python, so with the standard library alone:

    _environment.py uv              prints the folder of uv, which is fetched if it is missing
    _environment.py install HASH    makes .venvs/HASH with this Python, and does what `tidy` does
    _environment.py tidy HASH DIR   links .venv to DIR, unless it leads to another environment of HASH, and
                                    removes environments of other hashes that no process uses

An environment cannot be moved, because its programs hold their own paths. So it is made where it stays; its
file `stamp` is written last, and only then does .venv lead to it. A process that runs in an environment holds
a shared lock on its stamp, and one that removes it an exclusive one.
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
UV_VERSION = "0.13.9"
UV = ROOT / ".cache" / f"uv-{UV_VERSION}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def install_lock(wait: bool = True) -> Iterator[None]:
    """Keeps out every other process that installs or removes. uv inherits the lock, and so outlives no owner.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
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
    """Whether an environment is whole and of the lock file whose sha256 begins with `lock_hash`."""
    try:
        return (folder / "stamp").read_text().startswith(lock_hash)
    except OSError:
        return False


def runs(folder: Path) -> bool:
    """Whether the environment's Python starts: the Python that it was made with may be gone."""
    try:
        return subprocess.run([folder / "bin" / "python", "-I", "-S", "-c", ""], check=False).returncode == 0
    except OSError:
        return False


# Installing


def fetch_uv() -> Path:
    """The folder of uv. The caller holds the install lock.

    Raises:
        SystemExit: pip is missing.
        subprocess.CalledProcessError: pip failed, and has said why.
    """
    if (UV / "bin" / "uv").exists():
        return UV
    partial = UV.with_name(f"{UV.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = ["install", "-qq", "--disable-pip-version-check", "--target", str(partial), f"uv=={UV_VERSION}"]
    _run(_python_with_pip(), "-m", "pip", *options)
    partial.replace(UV)
    return UV


def _run(*command: str | Path) -> None:
    """Its output goes to standard error, and it inherits the install lock."""
    subprocess.run(command, stdout=2, check=True, close_fds=False)


def _python_with_pip() -> str:
    for python in (sys.executable, shutil.which("python3"), shutil.which("python")):
        if python and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            return python
    sys.exit(f"pip is needed to fetch uv, and {sys.executable} has none: install pip for it, and try again.")


def install(lock_hash: str) -> None:
    """
    Raises:
        SystemExit: the environment's folder is broken and in use; or as `fetch_uv`.
        subprocess.CalledProcessError: pip or uv failed, and has said why.
    """
    folder = ENVIRONMENTS / lock_hash
    with install_lock():
        if not (is_current(folder, lock_hash) and runs(folder)):  # else another script was faster
            with unused(folder) as free:
                if not free:
                    sys.exit(
                        f"The Python of {folder} is gone, and processes still use that folder: stop them, "
                        "and try again."
                    )
                _make(folder)
        _tidy(lock_hash, folder)


def _make(folder: Path) -> None:
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


# Tidying


def _tidy(lock_hash: str, newest: Path) -> None:
    """Links .venv to `newest`, unless it leads to an environment of this hash already, and removes
    environments of other hashes that no process uses. The caller holds the install lock.
    """
    if not is_current(LINK, lock_hash) or not runs(LINK):
        _link(newest)
    for folder in ENVIRONMENTS.iterdir():
        if folder.is_dir() and folder.name != lock_hash:
            _remove_if_unused(folder)


def _link(folder: Path) -> None:
    """Switches .venv atomically. A real folder, as earlier versions made it, is removed first if it is
    unused, and otherwise stays: scripts/_env finds environments without the link too.
    """
    is_folder = LINK.is_dir() and not LINK.is_symlink()
    if is_folder and not ((LINK / "stamp").exists() and _remove_if_unused(LINK)):
        return
    new = ENVIRONMENTS / ".link"
    new.unlink(missing_ok=True)
    new.symlink_to(folder.relative_to(ROOT))
    new.replace(LINK)


def _remove_if_unused(folder: Path) -> bool:
    with unused(folder) as free:
        if free:
            (folder / "stamp").unlink(missing_ok=True)  # what is half removed is not taken for whole
            shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether no process uses the environment in `folder`, and then none can start to in the block."""
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context((folder / "stamp").open("r+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:  # not whole, so no script uses it
            pass
        except OSError:  # locked; or of another user, or on a file system without locks
            yield False
            return
        yield not _is_open(folder)


def _is_open(folder: Path) -> bool:
    """Whether a process has files of `folder` mapped, or was started from it; true if nothing tells it.
    Such a process may hold no lock: an editor's, or a server that earlier versions of these scripts started.
    """
    inside = os.fsencode(folder) + b"/"
    if Path("/proc/self/maps").exists():
        for process in Path("/proc").glob("[0-9]*"):
            for file in ("maps", "cmdline"):
                with contextlib.suppress(OSError):  # has ended, or is another user's
                    if inside in (process / file).read_bytes():
                        return True
        return False
    try:
        return inside in subprocess.run(["lsof", "-n", "-P", "-F", "n"], capture_output=True).stdout
    except OSError:
        return True


def main() -> int:
    command, *rest = sys.argv[1:]
    try:
        if command == "uv":
            with install_lock():
                print(fetch_uv())
        elif command == "install":
            install(rest[0])
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
        if command != "tidy":  # which another script does as well, or a later one
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
