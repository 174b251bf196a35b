"""Each mode over HTTP: lengths, channels, formats, seeds, tags and decoders."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutagen.id3
import numpy as np
import pytest
import soundfile
from replies import clip, output, samples
from server import CogServer

FRAME = 640
"""Samples of a frame of the codec."""
RATE = 32_000
"""Samples per second."""


@pytest.fixture(scope="module")
def stereo(weights: Path) -> Iterator[CogServer]:
    """A server with the tiny stereo model and no base model, so that encode-decode is stereo too."""
    with CogServer(
        COG_WEIGHTS=str(weights / "stereo"), MUSICGEN_WEIGHTS_DIR="nowhere", OMP_NUM_THREADS="1"
    ) as running:
        assert running.health()["status"] == "READY", running.log
        yield running


def frames_of(seconds: float) -> int:
    """The codec's frames of a clip, the last one perhaps incomplete."""
    return -(-round(seconds * RATE) // FRAME)


@pytest.mark.parametrize("format", ["wav", "mp3"])
@pytest.mark.parametrize("duration", [1, 7])
def test_text_is_exactly_as_long_as_asked(server: CogServer, duration: int, format: str) -> None:
    sound, rate = samples(
        server.predict({"prompt": "a waltz", "duration": duration, "output_format": format})
    )
    assert rate == RATE and sound.shape == (1, duration * RATE)


@pytest.mark.parametrize("duration", [30, 49])  # one window, and three
def test_text_beyond_the_window_is_exactly_as_long_as_asked(server: CogServer, duration: int) -> None:
    reply = server.predict({"prompt": "a waltz", "duration": duration, "model_version": "small"})
    sound, _ = samples(reply)
    assert sound.shape == (1, duration * RATE)
    assert reply["metrics"]["audio_seconds"] == duration


@pytest.mark.parametrize(("clip_s", "duration"), [(0.5, 1), (3.21, 2), (33.0, 1), (2.0, 49)])
def test_melody_is_exactly_as_long_as_asked(server: CogServer, clip_s: float, duration: int) -> None:
    sound, _ = samples(server.predict({"input_audio": clip(clip_s), "duration": duration}))
    assert sound.shape == (1, duration * RATE)


@pytest.mark.parametrize(
    ("clip_s", "start", "end", "used_s"),
    [(2.0, 0, None, 2.0), (2.013, 0, -1, 2.013), (5.5, 1, 4, 3.0), (5.5, 2, 90, 3.5), (31.3, 0, None, 31.3)],
)
def test_continuation_is_the_selected_clip_and_then_new_music(
    server: CogServer, clip_s: float, start: int, end: int | None, used_s: float
) -> None:
    fields: dict[str, Any] = {
        "input_audio": clip(clip_s), "continuation": True, "continuation_start": start, "duration": 2,
        "model_version": "small", "seed": 1,
    }  # fmt: skip
    if end is not None:
        fields["continuation_end"] = end
    sound, _ = samples(server.predict(fields))
    assert sound.shape == (1, (frames_of(used_s) + 100) * FRAME)


def test_continuation_over_several_windows_is_exactly_as_long_as_asked(server: CogServer) -> None:
    fields = {"input_audio": clip(2.0), "continuation": True, "duration": 47, "model_version": "small"}
    assert samples(server.predict(fields))[0].shape == (1, 49 * RATE)


def test_continuation_begins_with_the_clip_as_the_codec_decodes_it(server: CogServer) -> None:
    fields = {"input_audio": clip(3.0), "normalization_strategy": "clip", "seed": 1}
    coded, _ = samples(server.predict(fields | {"model_version": "encode-decode"}))
    continued, _ = samples(
        server.predict(fields | {"model_version": "small", "continuation": True, "duration": 1})
    )
    middle = slice(RATE // 2, 2 * RATE)  # what comes next changes the last frames
    assert np.abs(coded[0, middle] - continued[0, middle]).max() < 2e-4


@pytest.mark.parametrize("seconds", [0.01, 1.0, 2.3456, 34.0, 65.0])
def test_encode_decode_returns_every_sample(server: CogServer, seconds: float) -> None:
    reply = server.predict({"input_audio": clip(seconds), "model_version": "encode-decode"})
    assert samples(reply)[0].shape == (1, round(seconds * RATE))
    assert reply["metrics"]["steps"] == 0


def test_encode_decode_takes_the_selected_part_and_ignores_sampling(server: CogServer) -> None:
    fields = {"input_audio": clip(4.0), "model_version": "encode-decode", "continuation_start": 1, "seed": 1}
    part = fields | {"continuation_end": 3}
    other = part | {"prompt": "x", "duration": 9, "top_k": 1, "temperature": 0, "continuation": True}
    assert samples(server.predict(part))[0].shape == (1, 2 * RATE)
    assert np.array_equal(samples(server.predict(part))[0], samples(server.predict(other))[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a waltz", "duration": 1},
        {"input_audio": clip(1.5), "duration": 1},
        {"input_audio": clip(1.5), "continuation": True, "duration": 1},
        {"input_audio": clip(1.25), "model_version": "encode-decode"},
    ],
    ids=["text", "melody", "continuation", "encode-decode"],
)
def test_multi_band_diffusion_replaces_the_decoder_in_every_mode(
    server: CogServer, fields: dict[str, Any]
) -> None:
    fields = fields | {"seed": 5, "normalization_strategy": "clip"}
    plain, _ = samples(server.predict(fields))
    diffused, _ = samples(server.predict(fields | {"multi_band_diffusion": True}))
    again, _ = samples(server.predict(fields | {"multi_band_diffusion": True}))
    assert plain.shape == diffused.shape
    assert not np.array_equal(plain, diffused)
    assert np.array_equal(diffused, again)


class TestStereo:
    def test_text_gives_two_different_channels(self, stereo: CogServer) -> None:
        sound, _ = samples(stereo.predict({"prompt": "a waltz", "duration": 2}))
        assert sound.shape == (2, 2 * RATE)
        assert not np.array_equal(sound[0], sound[1])

    def test_mp3_has_two_channels(self, stereo: CogServer) -> None:
        sound, _ = samples(stereo.predict({"prompt": "a waltz", "duration": 2, "output_format": "mp3"}))
        assert sound.shape == (2, 2 * RATE)

    def test_continuation_of_a_mono_or_a_stereo_clip_is_stereo(self, stereo: CogServer) -> None:
        for channels in (1, 2):
            fields = {"input_audio": clip(1.5, channels=channels), "continuation": True, "duration": 1}
            assert samples(stereo.predict(fields))[0].shape == (2, (75 + 50) * FRAME)

    def test_encode_decode_is_the_finetunes_where_there_is_no_base_model(self, stereo: CogServer) -> None:
        fields = {"input_audio": clip(1.111, channels=2), "model_version": "encode-decode"}
        assert samples(stereo.predict(fields))[0].shape == (2, round(1.111 * RATE))

    def test_multi_band_diffusion_gives_two_channels(self, stereo: CogServer) -> None:
        fields = {"prompt": "a waltz", "duration": 1, "multi_band_diffusion": True}
        assert samples(stereo.predict(fields))[0].shape == (2, RATE)

    def test_a_melody_is_refused(self, stereo: CogServer) -> None:
        reply = stereo.predict({"input_audio": clip(1.0)})
        assert reply["status"] == "failed" and "'melody'" in reply["error"], reply


class TestSeeds:
    @pytest.mark.parametrize("seed", [0, 4294967295])
    def test_a_given_seed_is_reported_everywhere(self, server: CogServer, seed: int) -> None:
        for format in ("wav", "mp3"):
            reply = server.predict({"prompt": "x", "duration": 1, "seed": seed, "output_format": format})
            assert reply["metrics"]["seed"] == seed
            assert f"seed: {seed}" in reply["logs"]
            assert provenance(reply, format)["seed"] == seed

    @pytest.mark.parametrize("fields", [{}, {"seed": -1}])
    def test_a_drawn_seed_reproduces_the_piece(self, server: CogServer, fields: dict[str, Any]) -> None:
        first = server.predict({"prompt": "x", "duration": 1, **fields})
        other = server.predict({"prompt": "x", "duration": 1, **fields})
        again = server.predict({"prompt": "x", "duration": 1, "seed": first["metrics"]["seed"]})
        assert output(first) == output(again) != output(other)

    def test_the_same_request_gives_the_same_bytes_whatever_ran_before(self, server: CogServer) -> None:
        a = {"input_audio": clip(1.3), "prompt": "a waltz", "duration": 1, "seed": 7}
        b = {"prompt": "x", "duration": 2, "model_version": "small", "seed": 9, "multi_band_diffusion": True}
        first, _, again = (output(server.predict(fields)) for fields in (a, b, a))
        assert first == again

    def test_mp3_bytes_are_reproducible(self, server: CogServer) -> None:
        fields = {"prompt": "x", "duration": 1, "seed": 7, "output_format": "mp3"}
        assert output(server.predict(fields)) == output(server.predict(fields))


def provenance(reply: dict[str, Any], format: str) -> dict[str, Any]:
    """The provenance in the comment tag: what reproduces the file."""
    if format == "wav":
        with soundfile.SoundFile(io.BytesIO(output(reply))) as file:
            comment = file.comment
    else:
        comment = mutagen.id3.ID3(io.BytesIO(output(reply))).getall("COMM")[0].text[0]
    read: dict[str, Any] = json.loads(comment)
    return read


def test_tags_hold_what_reproduces_the_file_and_neither_prompt_nor_time(server: CogServer) -> None:
    fields = {"prompt": "a secret waltz", "duration": 1, "seed": 4, "top_k": 50, "temperature": 0.5}
    for format in ("wav", "mp3"):
        reply = server.predict(fields | {"output_format": format})
        tags = provenance(reply, format)
        assert (tags["seed"], tags["top_k"], tags["temperature"], tags["guidance"]) == (4, 50, 0.5, 3)
        assert tags["model"] == "finetuned" and len(tags["model_sha256"]) == 64 and tags["version"]
        assert tags["precision"] == "reference" and "continuation_start" not in tags
        content = output(reply)
        assert b"secret" not in content
        assert b"TDRC" not in content and b"ICRD" not in content and b"TDTG" not in content


def test_tags_hold_the_selection_and_the_codec_where_there_is_no_model(server: CogServer) -> None:
    fields = {"input_audio": clip(3.0), "continuation_start": 1, "continuation_end": 2, "seed": 4}
    tags = provenance(server.predict(fields | {"model_version": "encode-decode"}), "wav")
    assert (tags["continuation_start"], tags["continuation_end"]) == (1, 2)
    assert len(tags["codebooks_sha256"]) == 64 and "top_k" not in tags
    tags = provenance(server.predict(fields | {"continuation": True, "duration": 1}), "wav")
    assert (tags["continuation_start"], tags["continuation_end"]) == (1, 2)


def test_different_melodies_give_different_music(server: CogServer) -> None:
    fields = {"duration": 2, "temperature": 0, "normalization_strategy": "clip"}
    first, _ = samples(server.predict(fields | {"input_audio": clip(2.0, hz=262.0)}))
    second, _ = samples(server.predict(fields | {"input_audio": clip(2.0, hz=370.0)}))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("strategy", "peak_db"), [("peak", -1.0), ("clip", None), ("rms", None)])
def test_normalization_reaches_the_file(server: CogServer, strategy: str, peak_db: float | None) -> None:
    fields = {"input_audio": clip(1.0), "model_version": "encode-decode", "normalization_strategy": strategy}
    sound, _ = samples(server.predict(fields))
    if peak_db is not None:
        assert 20 * np.log10(np.abs(sound).max()) == pytest.approx(peak_db, abs=0.01)
    elif strategy == "rms":
        assert 10 * np.log10((sound**2).mean()) == pytest.approx(-18, abs=0.1)
    else:
        assert np.abs(sound).max() <= 10 ** (-1 / 20) + 1e-4
