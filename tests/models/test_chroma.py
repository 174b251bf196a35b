"""Our chroma equals audiocraft's, whose filters are librosa's."""

from typing import Any

import pytest
import torch
from sounds import noise, tone

from musicgen_svc.audiocraft_compat import ChromaExtractor
from musicgen_svc.models.chroma import Chroma

RELEASED: dict[str, Any] = {"sample_rate": 32_000, "n_chroma": 12, "radix2_exp": 14, "argmax": True}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"argmax": False},
        {"sample_rate": 24_000, "radix2_exp": 12, "argmax": False},
        {"n_chroma": 24, "nfft": 4096, "winlen": 2048, "winhop": 300, "argmax": False},
        {"n_chroma": 7, "radix2_exp": 9, "norm": 2.0, "argmax": False},
    ],
    ids=str,
)
def test_it_equals_audiocrafts_to_the_bit(change: dict[str, Any]) -> None:
    options = RELEASED | change
    ours, theirs = Chroma(**options), ChromaExtractor(**options)
    assert torch.equal(ours.fbanks, theirs.fbanks)
    assert [(name, tensor.shape) for name, tensor in ours.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in theirs.state_dict().items()
    ]
    for samples in (1, 5_000, 70_001):
        wav = torch.from_numpy(noise(3, 32_000))[None, :, :samples]
        assert torch.equal(ours(wav), theirs(wav))
    assert (ours.sample_rate, ours.winhop) == (theirs.sample_rate, theirs.winhop)


@pytest.mark.parametrize(("hz", "pitch_class"), [(261.63, 0), (440.0, 9), (466.16, 10), (987.77, 11)])
def test_it_finds_the_pitch_class_of_a_note(hz: float, pitch_class: int) -> None:
    chroma = Chroma(**RELEASED)(torch.from_numpy(tone(hz, 2, 32_000))[None])
    assert set(chroma[0, 2:-2].argmax(-1).tolist()) == {pitch_class}
