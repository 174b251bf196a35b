"""Plays audio while it is generated, with a player of this machine, or writes it as a wav that grows."""

import base64
import contextlib
import queue
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from musicgen_svc.cli.client import FailedError
from musicgen_svc.cli.inputs import UsageError
from musicgen_svc.cli.terminal import note

Chunk = dict[str, Any]
"""A chunk of audio, as `musicgen_svc/live.py` describes it."""

PLAYERS = (
    ("ffplay", "-nodisp", "-autoexit", "-loglevel", "error", "-"),
    ("aplay", "-q", "-"),
    ("afplay",),
)
"""Commands that play sound. All but afplay read a wav from standard input; afplay is given files."""
UNKNOWN_SIZE = 0xFFFFFFFF


class Listener(Protocol):
    """Takes the chunks of one prediction."""

    def add(self, chunk: Chunk) -> None:
        """Takes the next chunk, without waiting until it is played."""

    def finish(self) -> None:
        """Waits until all chunks are played."""


def wav_header(chunk: Chunk, size: int = UNKNOWN_SIZE) -> bytes:
    """Makes the header of a wav with the format of a chunk. `size`: of the samples, in bytes."""
    rate, channels = chunk["sample_rate"], chunk["channels"]
    riff = UNKNOWN_SIZE if size == UNKNOWN_SIZE else size + 36
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", riff)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + (struct.pack("<I", size))
    )


class GrowingWav:
    """Writes chunks to a stream as one wav, whose header does not know its length."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._begun = False

    def add(self, chunk: Chunk) -> None:
        """Writes a chunk.

        Raises:
            FailedError: the stream is closed at its other end.
        """
        samples = base64.b64decode(chunk["pcm"])
        try:
            self._stream.write(samples if self._begun else wav_header(chunk) + samples)
            self._stream.flush()
        except OSError as error:
            raise FailedError(f"The audio cannot be written to standard output: {error.strerror}.") from None
        self._begun = True

    def finish(self) -> None:
        """Does nothing, because every chunk was written when it came."""


class Player:
    """Plays chunks with a command, on a thread. A player that fails is noted, and nothing else fails."""

    def __init__(self, command: tuple[str, ...]) -> None:
        """Starts the thread. `command`: one of PLAYERS."""
        self._command = command
        self._chunks: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._play, daemon=True)
        self._thread.start()

    def add(self, chunk: Chunk) -> None:
        """Puts a chunk into the queue of the thread."""
        self._chunks.put(chunk)

    def finish(self) -> None:
        """Waits until all chunks are played."""
        self._chunks.put(None)
        self._thread.join()

    def stop(self) -> None:
        """Ends the player, whatever it plays."""
        self._stopped = True
        self._chunks.put(None)
        if self._process is not None:
            self._process.kill()
        self._thread.join()

    def _play(self) -> None:
        """Plays all chunks until the end of the queue."""
        play = self._play_files if self._command[0] == "afplay" else self._play_stream
        with contextlib.suppress(OSError, FailedError):  # the exit status says more
            play()
        if self._process is not None and self._process.wait() != 0 and not self._stopped:
            note(f"{self._command[0]} cannot play: it ended with status {self._process.returncode}.")

    def _play_stream(self) -> None:
        """Writes all chunks to the command's standard input."""
        process = self._start(*self._command[1:], stdin=subprocess.PIPE)
        assert process.stdin
        with process.stdin as stream:
            wav = GrowingWav(stream)
            while (chunk := self._chunks.get()) is not None and not self._stopped:
                wav.add(chunk)

    def _play_files(self) -> None:
        """Plays what has come meanwhile as one file after the other."""
        with tempfile.TemporaryDirectory(prefix="musicgen-live-") as folder:
            ended = False
            while not ended and not self._stopped:
                waiting = [self._chunks.get()]
                with contextlib.suppress(queue.Empty):
                    while True:
                        waiting.append(self._chunks.get_nowait())
                chunks = [chunk for chunk in waiting if chunk is not None]
                ended = len(chunks) < len(waiting)
                if chunks:
                    samples = b"".join(base64.b64decode(chunk["pcm"]) for chunk in chunks)
                    path = Path(folder) / "chunk.wav"
                    path.write_bytes(wav_header(chunks[0], len(samples)) + samples)
                    if self._start(str(path), stdin=subprocess.DEVNULL).wait() != 0:
                        return

    def _start(self, *arguments: str, stdin: int) -> "subprocess.Popen[bytes]":
        """Starts the command."""
        command = [self._command[0], *arguments]
        self._process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.DEVNULL)
        return self._process


def installed_player() -> tuple[str, ...]:
    """Returns the first of PLAYERS that this machine has.

    Raises:
        UsageError: it has none.
    """
    for command in PLAYERS:
        if shutil.which(command[0]):
            return command
    raise UsageError(
        "--live needs ffplay, aplay or afplay to play sound, and none is on PATH: install one (ffplay comes "
        "with FFmpeg), or write the sound with `--live -o -` to a program that plays it."
    )


@contextlib.contextmanager
def playing(command: tuple[str, ...]) -> Iterator[Player]:
    """Context manager with a player, which an exception stops."""
    player = Player(command)
    try:
        yield player
    except BaseException:
        player.stop()
        raise
