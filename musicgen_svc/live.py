"""Audio that a client hears while it is generated: a request's tokens -> chunks of 16-bit samples.

The chunks are a preview. The level of the file is set when all of it is known (`audio/loudness.py`), that of
a chunk from what has come so far; and they are those of EnCodec, even if MultiBand Diffusion makes the file.
How a chunk reaches the client is not known here.
"""

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from musicgen_svc.audio.live_gain import LiveGain
from musicgen_svc.models.encodec import Codec
from musicgen_svc.runtime.ticks import Tick, no_tick

SendChunk = Callable[[dict[str, object]], None]
"""Sends a chunk to the client. Called in the order of the audio, in the request's thread."""
HoldDevice = Callable[[], AbstractContextManager[Tick]]
"""Makes a context manager that holds the device, and yields a tick for the work that uses it."""


class LiveAudio:
    """The preview of one request. Its tokens are pushed in order while they come.

    Each chunk is a piece of the codec's stream, as the values of a JSON object:

        index: 0 for the first chunk, and one more for each that follows.
        offset: how many samples of each channel came before.
        sample_rate: in Hz; channels: 1 or 2.
        pcm: the samples as base64: 16-bit little-endian integers, left and right in turn.
    """

    def __init__(self, codec: Codec, hold: HoldDevice, send: SendChunk) -> None:
        """Makes a preview that has not begun.

        Args:
            codec: decodes the tokens.
            hold: how the device is held.
            send: sends a chunk. The device is not held meanwhile.
        """
        self._codec, self._hold, self._send = codec, hold, send
        self._stream, self._gain = codec.stream(), LiveGain(codec.sample_rate)
        self._waiting: list[Tensor] = []
        self._tick: Tick = no_tick
        self._index = self._offset = 0

    def push(self, tokens: Tensor) -> None:
        """Takes the next tokens [K, n], and sends the chunks that they complete.

        Tokens that complete no chunk only wait here, and the device is not used for them.
        """
        self._waiting.append(tokens)
        missing = self._stream.missing
        if missing is not None and sum(frames.shape[1] for frames in self._waiting) >= missing:
            self._send_all(self._decoded())

    def finish(self, samples: int | None = None) -> None:
        """Sends what remains after the last tokens.

        Args:
            samples: the length of the file, if it ends before the last frame does; it may be shorter by less
                than a frame.
        """
        if self._waiting:
            self._send_all(self._decoded())
        self._send_all(self._stream.finish(self._check), samples)

    def _decoded(self) -> Iterator[Tensor]:
        """Yields the pieces [C, T] that the waiting tokens complete."""
        tokens, self._waiting = torch.cat([frames.cpu() for frames in self._waiting], 1), []
        yield from self._stream.push(tokens, self._check)

    def _check(self) -> None:
        """Is called within the decoding, and yields the device to other requests."""
        self._tick(0, 1)

    def _send_all(self, pieces: Iterator[Tensor], samples: int | None = None) -> None:
        """Computes pieces one by one, each with the device held, and sends them; none beyond `samples`."""
        while True:
            with self._hold() as self._tick:
                piece = next(pieces, None)
                piece = None if piece is None else piece.float().cpu()
            if piece is None:
                return
            if samples is not None:
                piece = piece[:, : samples - self._offset]
            self._send(self._chunk(self._gain.apply(piece)))
            self._index += 1
            self._offset += piece.shape[1]

    def _chunk(self, samples: Tensor) -> dict[str, object]:
        """Makes a chunk of samples [C, T] in (-1, 1)."""
        integers = (samples * 32767).round().T.contiguous().numpy().astype("<i2")
        return {
            "index": self._index,
            "offset": self._offset,
            "sample_rate": self._codec.sample_rate,
            "channels": self._codec.channels,
            "pcm": base64.b64encode(integers.tobytes()).decode(),
        }
