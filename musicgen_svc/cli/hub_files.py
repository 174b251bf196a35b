"""Files of Hugging Face repositories: lists them with their hashes, and downloads them.

HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and similar variables are read by huggingface_hub and have its meaning.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils.sha import git_hash

from musicgen_svc.errors import DISK_FULL, WeightsError
from musicgen_svc.weights.lock_file import LockedFile, sha256_of

AGAIN = "run the same command again to go on where it stopped"
"""What an error tells the user to do."""


@dataclass(frozen=True)
class Remote:
    """One file of one commit on the hub."""

    repository: str
    revision: str
    name: str
    label: str
    """Folder and name, for messages."""
    size: int
    """In bytes."""
    sha256: str | None
    """None if the file is not in large file storage. The hub then publishes `git_sha1` only."""
    git_sha1: str | None

    @property
    def content(self) -> str:
        """A hash: equal for equal content."""
        content = self.sha256 or self.git_sha1
        assert content is not None
        return content

    def recognise(self, path: Path) -> LockedFile | None:
        """Reads the file at `path`, and returns its record if its content is that of this file."""
        if not path.is_file() or path.stat().st_size != self.size:
            return None
        sha256 = sha256_of(path)
        same = sha256 == self.sha256 if self.sha256 else git_hash(path.read_bytes()) == self.git_sha1
        return LockedFile(self.size, sha256) if same else None


@contextmanager
def explained(what: str, to_come: Callable[[], int] | None = None) -> Iterator[None]:
    """Context manager: turns errors of the hub, the network and the disk into a WeightsError.

    Args:
        what: the file or repository that the sentence names.
        to_come: returns how many bytes are still missing, for the case that the disk is full.
    """
    try:
        yield
    except OfflineModeIsEnabled as exc:
        raise WeightsError(f"{what} must be downloaded but HF_HUB_OFFLINE is set: unset it.") from exc
    except HfHubHTTPError as exc:
        raise WeightsError(_refusal(what, exc.response.status_code)) from exc
    except HTTPError as exc:
        raise WeightsError(
            f"The connection to {constants.ENDPOINT} failed at {what} ({_reason(exc)}): check the network "
            f"and HF_ENDPOINT, then {AGAIN}."
        ) from exc
    except OSError as exc:
        if exc.errno in DISK_FULL:
            room = f"{to_come():,} bytes" if to_come else "some space"
            raise WeightsError(f"The disk is full at {what}: free {room}, then {AGAIN}.") from exc
        raise WeightsError(f"{what} could not be fetched ({_reason(exc)}): {AGAIN}.") from exc


def _reason(exc: Exception) -> str:
    """The first line of an error's text."""
    lines = str(exc).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(exc).__name__


def _refusal(what: str, status: int) -> str:
    """The sentence for an HTTP status of the hub."""
    remedies = {
        401: "set HF_TOKEN to a token that may read it, or check that it exists",
        403: "ask for access on its page, with the account that HF_TOKEN belongs to",
        404: "it does not exist there; check HF_ENDPOINT, or take the newest with --update",
    }
    return f"{constants.ENDPOINT} answered {status} for {what}: {remedies.get(status, 'try again later')}."


def files_of(repository: str, revision: str | None, folder: str) -> tuple[str, list[Remote]]:
    """Lists the files at the top of a repository.

    Args:
        repository: owner/name.
        revision: a commit. None: the newest.
        folder: the name for messages.

    Returns:
        tuple: the commit, and its files.

    Raises:
        WeightsError: the hub is out of reach or refuses.
    """
    try:
        with explained(repository):
            info = HfApi().model_info(
                repository, revision=revision, files_metadata=True, timeout=constants.DEFAULT_REQUEST_TIMEOUT
            )
    except (KeyError, TypeError, ValueError) as exc:
        raise WeightsError(
            f"{constants.ENDPOINT} does not answer as a Hugging Face hub does: check HF_ENDPOINT."
        ) from exc
    remotes = []
    for file in info.siblings or []:
        sha256 = file.lfs.sha256 if file.lfs else None
        if file.size is None or info.sha is None or not (sha256 or file.blob_id):
            raise WeightsError(
                f"{constants.ENDPOINT} publishes no size or hash of {repository}/{file.rfilename}."
            )
        # A name with a slash could be a path out of the folder, and no file that we need has one.
        if "/" not in file.rfilename:
            label = f"{folder}/{file.rfilename}"
            remotes.append(
                Remote(repository, info.sha, file.rfilename, label, file.size, sha256, file.blob_id)
            )
    return info.sha or "", remotes


def fetch(remote: Remote, path: Path) -> LockedFile:
    """Downloads a file, continuing a partial one, and compares its hash with the published one.

    Args:
        remote: the file.
        path: where it is written, and where an earlier part of it may be.

    Returns:
        LockedFile: its record.

    Raises:
        WeightsError: the transfer failed, and the part that has arrived is kept; or the hash is wrong, and
        the
            file is removed.
    """
    with explained(remote.label, lambda: remote.size - (path.stat().st_size if path.exists() else 0)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if constants.HF_XET_HIGH_PERFORMANCE and not constants.HF_HUB_DISABLE_XET:
            _fetch_whole(remote, path)
        else:
            _fetch_rest(remote, path)
        arrived = remote.recognise(path)
        if arrived is None:
            path.unlink()
    if arrived is None:
        raise WeightsError(
            f"{remote.label} arrived with another hash than {remote.repository} publishes and was removed: "
            "run the same command again."
        )
    return arrived


def _fetch_rest(remote: Remote, path: Path) -> None:
    """Downloads the rest of a file over HTTP.

    This uses the function beneath `hf_hub_download`, which itself would keep nothing of an interrupted file.
    """
    # A part of a compressed answer could not be continued.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with path.open("ab") as file:
        if file.tell() > remote.size:
            file.truncate(0)
            file.seek(0)
        http_get(
            hf_hub_url(remote.repository, remote.name, revision=remote.revision),
            file,
            resume_size=file.tell(),
            headers=headers,
            expected_size=remote.size,
            displayed_filename=remote.label,
        )


def _fetch_whole(remote: Remote, path: Path) -> None:
    """Downloads a whole file over Xet, if the hub has it.

    Xet uses many connections for one file, but an interrupted file starts again from the beginning.
    """
    if remote.recognise(path) is None:
        folder = path.parent / "whole"
        hf_hub_download(remote.repository, remote.name, revision=remote.revision, local_dir=folder)
        (folder / remote.name).replace(path)
