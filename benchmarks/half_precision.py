"""Measures on a CPU how far reduced precision changes what surrounds the language model on a GPU.

    .venv/bin/python -m benchmarks.half_precision --json benchmarks/results/half-precision.json

Each part computes the same input in fp32 and in another precision. The figure is the signal-to-noise ratio in
decibels; the fp32 result is the signal, and its difference to the other result is the noise. In float16 and
bfloat16 all weights and all results of operations are rounded. TF32 is imitated: the factors of convolutions
and of the LSTM's products are rounded as tensor cores do it, except for the state between two of its steps.

The codec and MultiBand Diffusion are those of the demo model, and an EnCodec of the released size with random
weights; T5 is T5-base with random weights. No released weights have been measured.
"""

import argparse
import copy
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.load_files import T5_BASE
from musicgen_svc.audiocraft_compat import CompressionModel
from musicgen_svc.checkpoints import TransformersPart
from musicgen_svc.loading.opener import Opener
from musicgen_svc.loading.parts import codec_spec
from musicgen_svc.models.diffusion_bands import load_bands
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.multiband_diffusion import MultiBandDiffusion
from musicgen_svc.models.t5 import T5Encoder, load_t5
from musicgen_svc.runtime.randomness import GlobalRandom
from musicgen_svc.weights.catalog import DIFFUSION_FILE, read_catalog
from musicgen_svc.weights.paths import FINETUNED, Weights

CPU = torch.device("cpu")
DEMO = Path("weights/8songs")
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SEED = 1
PROMPT_TOKENS = 16
PRODUCTS = {torch.conv1d, torch.conv_transpose1d, torch.lstm}
Figures = dict[str, float]
"""A precision -> decibels, or a share of tokens."""


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="Measures what reduced precision changes.")
    parser.add_argument("--json", type=Path, help="file for the results")
    given = parser.parse_args()
    rows: dict[str, Callable[[], dict[str, Figures]]] = {
        "EnCodec of the demo model": lambda: of_codec(demo_codec(), seconds=8),
        "EnCodec of the released size, random": lambda: of_codec(random_codec(), seconds=2),
        "T5-base, random": lambda: {"embeddings": of_t5(random_t5())},
        "MultiBand Diffusion of the demo model": lambda: {"samples": of_diffusion(seconds=2)},
    }
    found: dict[str, Any] = {"machine": {"torch": torch.__version__, "cpu": platform.machine()}}
    for name, row in rows.items():
        found[name] = row()
        print(f"{name}:", json.dumps(found[name]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def snr_db(found: Tensor, wanted: Tensor) -> float:
    """Returns the signal-to-noise ratio in decibels of a tensor beside the wanted one of the same shape."""
    signal, noise = wanted.double(), found.double() - wanted.double()
    return round(float(10 * torch.log10(signal.square().sum() / noise.square().sum())), 1)


def tf32(x: Tensor) -> Tensor:
    """Rounds fp32 numbers to the 11 significant bits of TF32, halves to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Tf32(TorchFunctionMode):
    """The mode in which the factors of `PRODUCTS` are rounded to TF32. Vectors, which are biases, are not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            args = tuple(self._rounded(arg) for arg in args)
        return func(*args, **(kwargs or {}))

    def _rounded(self, given: Any) -> Any:
        """Rounds a factor, or those in a list of weights."""
        if isinstance(given, list):
            return [self._rounded(part) for part in given]
        return tf32(given) if isinstance(given, Tensor) and given.dim() > 1 else given


def of_codec(model: CompressionModel, seconds: int) -> dict[str, Figures]:
    """Decodes random tokens, and encodes the samples again.

    Returns:
        The ratio of the samples, and the share of equal tokens.
    """
    exact = Codec(model)
    draw = torch.Generator().manual_seed(SEED)
    shape = (exact.codebooks, int(seconds * exact.frame_rate))
    tokens = torch.randint(exact.cardinality, shape, generator=draw)
    wav = exact.decode(tokens)
    heard = exact.encode(wav)
    samples, equal = Figures(), Figures()

    def compare(name: str, codec: Codec) -> None:
        samples[name] = snr_db(codec.decode(tokens), wav)
        equal[name] = round(float((codec.encode(wav) == heard).float().mean()), 4)

    with Tf32():
        compare("tf32", exact)
    for name, dtype in HALF.items():
        compare(name, Codec(copy.deepcopy(model).to(dtype)))
    return {"samples": samples, "equal tokens": equal}


@torch.inference_mode()
def of_t5(encoder: T5Encoder) -> Figures:
    """Encodes random tokens of a prompt."""
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(encoder.vocab_size, (1, PROMPT_TOKENS), generator=draw)
    mask = torch.ones_like(ids)
    wanted = encoder(ids, mask)
    return {name: snr_db(copy.deepcopy(encoder).to(dtype)(ids, mask), wanted) for name, dtype in HALF.items()}


def of_diffusion(seconds: int) -> Figures:
    """Decodes random tokens from the same noise: in TF32, and with the U-Nets under autocast to float16."""
    codec = Codec(demo_codec())
    bands = load_bands(DEMO / "multiband-diffusion" / DIFFUSION_FILE, CPU)
    draw = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(
        codec.cardinality, (codec.codebooks, int(seconds * codec.frame_rate)), generator=draw
    )

    def decoded(half: bool = False) -> Tensor:
        with GlobalRandom(SEED, CPU).pinned():
            return MultiBandDiffusion(bands, codec, half=half).decode(tokens)

    wanted = decoded()
    with Tf32():
        rounded = decoded()
    return {"tf32": snr_db(rounded, wanted), "float16": snr_db(decoded(half=True), wanted)}


def demo_codec() -> CompressionModel:
    """Loads the demo model's EnCodec."""
    weights = Weights.at(DEMO.parent, read_catalog(), str(DEMO))
    opened = Opener(weights, 1.0).open(FINETUNED)
    return codec_spec(weights, opened, opened.config(), CPU).build()


def random_codec() -> CompressionModel:
    """Makes an EnCodec of the size of the released one at 32 kHz."""
    from tests.random_encodec import encodec

    return encodec(dimension=128, n_filters=64)


def random_t5() -> T5Encoder:
    """Makes a T5-base with the initial values of transformers."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(SEED)
    model = T5EncoderModel(T5Config(**T5_BASE))
    return load_t5(TransformersPart(model.config.to_dict(), model.state_dict(), "T5-base"), CPU)


if __name__ == "__main__":
    main()
