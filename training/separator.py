"""Writes a Demucs model for the demo model, in whose music nothing has to be separated."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

SIGNATURE = "955717e8"
KWARGS: dict[str, Any] = {
    "sources": ["drums", "bass", "other", "vocals"],
    "audio_channels": 2,
    "channels": 16,
    "depth": 1,
    "rewrite": False,
    "lstm_layers": 0,
    "kernel_size": 4,
    "stride": 4,
    "gelu": False,
    "glu": False,
    "dconv_mode": 0,
    "normalize": False,
    "resample": False,
    "rescale": 0,
    "samplerate": 44_100,
    "segment": 10,
}
SEGMENT = {
    "_type": "fraction",
    "numerator": 39,
    "denominator": 5,
}  # 7.8 s, as in HTDemucs' file


def save_separator(folder: Path) -> None:
    """Writes a Demucs that copies its input to the stem `other`. The bytes are the same every time.

    Each of the four samples of a stride passes through ReLU(x) - ReLU(-x); the skip connection doubles them,
    and the decoder's weights halve them again.
    """
    from demucs.demucs import Demucs

    state = {key: torch.zeros_like(tensor) for key, tensor in Demucs(**KWARGS).state_dict().items()}
    other = 2 * KWARGS["sources"].index("other")
    for row in range(16):
        channel, tap, sign = row // 8, row // 2 % 4, 1 - 2 * (row % 2)
        state["encoder.0.0.weight"][row, channel, tap] = sign
        state["decoder.0.0.weight"][row, other + channel, tap] = sign / 2
    kwargs = json.dumps(KWARGS | {"segment": SEGMENT})
    file = save(state, {"klass": "demucs.demucs.Demucs", "args": "[]", "kwargs": kwargs})
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True).encode()  # the library orders it at random
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{SIGNATURE}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + file[end:])
    (folder / "htdemucs.yaml").write_text(f"models: ['{SIGNATURE}']\n")
