"""Computes condition tensors from a prompt and a melody.

audiocraft's conditioners download T5 and Demucs in their constructors. The conditioners of this module get
loaded models instead, and compute the same numbers. Every condition is a pair of an embedding [2, S, D] and a
mask [2, S]. Row 0 is what the request asks for, row 1 the null condition of classifier-free guidance.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from musicgen_svc.errors import InputError, WeightsError
from musicgen_svc.models.chroma import Chroma
from musicgen_svc.models.demucs import REACH_S
from musicgen_svc.models.t5 import T5Encoder
from musicgen_svc.runtime.ticks import Tick, no_tick

type Condition = tuple[torch.Tensor, torch.Tensor]
"""(embedding [2, S, D], mask [2, S])"""
type Conditions = dict[str, Condition]
"""Conditions by audiocraft's names of the attributes, in audiocraft's order: text, melody."""
type Separate = Callable[[torch.Tensor, Tick], torch.Tensor]
"""Extracts the melodic stems: [B, 1, T] -> [B, 1, T], both at the model's sample rate."""

TEXT = "description"
MELODY = "self_wav"

MAX_TOKENS = 2048
"""The longest prompt. T5's memory grows with the square of it. A prompt of 2,000 characters, the limit of the
contract, rarely has as many tokens; but the tokenizer expands some characters to up to 18 letters."""


class TextConditioner(nn.Module):
    """Encodes a prompt with a frozen T5 encoder and the checkpoint's projection."""

    def __init__(self, t5: nn.Module, tokenizer: Any, embedding_dim: int, output_dim: int) -> None:
        """Makes a conditioner whose projection has no weights of a checkpoint yet.

        Args:
            t5: the encoder, token ids [B, S] and mask [B, S] -> [B, S, embedding_dim].
            tokenizer: called as transformers' tokenizers are.
            embedding_dim: of the encoder.
            output_dim: of the language model.
        """
        super().__init__()
        self.output_proj = nn.Linear(embedding_dim, output_dim)
        self._t5 = (t5,)  # in a tuple, so that it is not registered: T5 is no part of a checkpoint
        self._tokenizer = tokenizer

    @torch.inference_mode()
    def forward(self, prompt: str | None, tick: Tick = no_tick) -> Condition:
        """Computes the condition of a prompt; None or an empty prompt gives the null condition.

        Raises:
            InputError: the prompt has more than `MAX_TOKENS` tokens.
        """
        device = self.output_proj.weight.device
        # Both rows are one padded batch, as in audiocraft: T5's numbers depend on it.
        inputs = self._tokenizer([prompt or "", ""], return_tensors="pt", padding=True).to(device)
        mask = inputs["attention_mask"]
        if mask.shape[1] > MAX_TOKENS:
            raise InputError(f"prompt has {mask.shape[1]} tokens; at most {MAX_TOKENS} are accepted.")
        mask[torch.tensor([not prompt, True], device=device)] = 0
        with torch.autocast(device.type, enabled=False):
            embedding = self._t5[0](inputs["input_ids"], mask, tick)
        embedding = self.output_proj(embedding.to(self.output_proj.weight))
        return embedding * mask.unsqueeze(-1), mask


class MelodyConditioner(nn.Module):
    """Encodes a melody as the chroma of its melodic stems, with the checkpoint's projection.

    As in audiocraft's `get_pretrained`, the chroma is cut or repeated to the length that the model was
    trained with, and the mask is 1 everywhere.
    """

    def __init__(
        self, separate: Separate, chroma: Chroma,
        duration_s: float, output_dim: int,
    ) -> None:  # fmt: skip
        """Makes a conditioner whose projection has no weights of a checkpoint yet.

        Args:
            separate: extracts the melodic stems.
            chroma: computes the chroma of the stems.
            duration_s: the length that the model was trained with.
            output_dim: of the language model.
        """
        super().__init__()
        self.output_proj = nn.Linear(chroma.n_chroma, output_dim)
        self.chroma = chroma
        self._separate = separate
        self._chroma_frames = 1 + int(chroma.sample_rate * duration_s) // chroma.winhop
        # Later samples cannot change the chroma of the first `duration_s` seconds.
        self._max_samples = int(chroma.sample_rate * (duration_s + REACH_S))

    @torch.inference_mode()
    def forward(self, melody: torch.Tensor | None, tick: Tick = no_tick) -> Condition:
        """Computes the condition of a melody [1, T] at the model's sample rate; None: the null melody."""
        device = self.output_proj.weight.device
        if melody is None:
            stems = torch.zeros(2, 1, 1, device=device)
        else:
            # The null condition is that of silence as long as the melody.
            melody = melody[:, : self._max_samples]
            batch = torch.stack([melody, torch.zeros_like(melody)]).to(device)
            with torch.autocast(device.type, enabled=False):
                stems = self._separate(batch, tick)
        with torch.autocast(device.type, enabled=False):
            chroma = self.chroma(stems)  # [2, S, 12]
        repeats = math.ceil(self._chroma_frames / chroma.shape[1])
        chroma = chroma.repeat(1, repeats, 1)[:, : self._chroma_frames]
        embedding = self.output_proj(chroma.to(self.output_proj.weight))
        return embedding, torch.ones_like(embedding[..., 0])


def build_melody_conditioner(
    config: DictConfig, separate: Separate, sample_rate: int, device: torch.device
) -> MelodyConditioner:
    """Builds the chroma that the checkpoint was trained with, and a projection without its weights.

    Args:
        config: the checkpoint's configuration, in audiocraft's form.
        separate: Demucs.
        sample_rate: the codec's, in Hz.
        device: where the model runs.
    """
    wanted = config.conditioners[MELODY].chroma_stem
    chroma = Chroma(
        sample_rate=sample_rate,
        n_chroma=wanted.n_chroma,
        radix2_exp=wanted.radix2_exp,
        **{name: wanted[name] for name in ("nfft", "winlen", "winhop", "argmax", "norm") if name in wanted},
    )
    duration_s = config.dataset.segment_duration
    return MelodyConditioner(separate, chroma.to(device), duration_s, config.transformer_lm.dim)


def conditioner_names(config: DictConfig) -> set[str]:
    """Returns the names of the checkpoint's conditioners: `TEXT` and perhaps `MELODY`.

    Raises:
        WeightsError: the configuration has a conditioner that MusicGen does not have, or none for text.
    """
    names = {str(name) for name in config.conditioners if name != "args"}
    unknown = {
        n for n in names if (n, config.conditioners[n].model) not in ((TEXT, "t5"), (MELODY, "chroma_stem"))
    }
    if unknown or TEXT not in names:
        raise WeightsError(
            f"The checkpoint is conditioned on {', '.join(sorted(names))}; "
            f"MusicGen takes a {TEXT} by t5 and, optionally, a {MELODY} by chroma_stem."
        )
    return names


class Conditioner(nn.Module):
    """All conditioners of one model, in place of those of audiocraft's language model.

    Attributes have audiocraft's names, so that the keys of a checkpoint fit.
    """

    def __init__(self, text: TextConditioner, melody: MelodyConditioner | None) -> None:
        super().__init__()
        self.conditioners = nn.ModuleDict({TEXT: text} | ({MELODY: melody} if melody else {}))

    @property
    def takes_melody(self) -> bool:
        """Whether the model has a melody conditioner."""
        return MELODY in self.conditioners

    def text(self, prompt: str | None, tick: Tick = no_tick) -> Conditions:
        """Computes the condition of the prompt.

        Raises:
            InputError: the prompt has more than `MAX_TOKENS` tokens.
        """
        return {TEXT: self.conditioners[TEXT](prompt, tick)}

    def melody(self, melody: torch.Tensor | None, tick: Tick = no_tick) -> Conditions:
        """Computes the condition of a melody [1, T] at the model's sample rate; None: the null melody.

        Returns no condition for a model that takes no melody.
        """
        if not self.takes_melody:
            assert melody is None
            return {}
        return {MELODY: self.conditioners[MELODY](melody, tick)}


def build_conditioner(
    config: DictConfig,
    t5: T5Encoder,
    tokenizer: Any,
    separate: Separate,
    sample_rate: int,
    device: torch.device,
) -> Conditioner:
    """Builds all conditioners that the checkpoint was trained with, their projections without weights.

    Args:
        config: the checkpoint's configuration, in audiocraft's form.
        t5: the text encoder.
        tokenizer: the tokenizer of the text encoder.
        separate: Demucs; used only if the model takes melodies.
        sample_rate: the codec's, in Hz.
        device: where the model runs.
    """
    text = TextConditioner(t5, tokenizer, t5.d_model, config.transformer_lm.dim)
    if MELODY not in conditioner_names(config):
        return Conditioner(text, None)
    return Conditioner(text, build_melody_conditioner(config, separate, sample_rate, device))


def looped(melody: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Returns the samples [start, start + length) of an endlessly repeated melody: [1, T] -> [1, length]."""
    positions = torch.arange(start, start + length, device=melody.device)
    return melody[..., positions % melody.shape[-1]]
