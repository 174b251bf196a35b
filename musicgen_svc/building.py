"""Configurations and state dicts -> audiocraft's modules on the device, weights assigned once."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from musicgen_svc.checkpoints import Checkpoint, TransformersPart
from musicgen_svc.checkpoints.fitting import check_fit
from musicgen_svc.compat import (
    ChromaExtractor,
    CompressionModel,
    HFEncodecCompressionModel,
    InterleaveStereoCompressionModel,
    LMModel,
    builders,
)
from musicgen_svc.conditioning import MELODY, TEXT, Conditioner, MelodyConditioner, Separate, TextConditioner
from musicgen_svc.errors import WeightsError, first_line


def build_text_conditioner(
    config: DictConfig, encoder: Path | TransformersPart, tokenizer_folder: Path, device: torch.device
) -> TextConditioner:
    """A T5 encoder, from its own folder or from inside a checkpoint, and an empty projection.

    Raises:
        WeightsError: there is no T5, or the checkpoint wants its prompts changed first.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    if config.conditioners[TEXT].t5.get("normalize_text"):
        raise WeightsError("The checkpoint normalizes its prompts (normalize_text), which needs spaCy.")
    try:
        tokenizer = T5Tokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        if isinstance(encoder, TransformersPart):
            t5 = T5EncoderModel(T5Config(**encoder.config))
            t5.load_state_dict(encoder.state)
        else:
            t5 = T5EncoderModel.from_pretrained(encoder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as exc:
        where = encoder.origin if isinstance(encoder, TransformersPart) else encoder
        raise WeightsError(f"{where} does not hold a T5 encoder: {first_line(exc)}") from exc
    t5 = t5.to(device, torch.float32).eval().requires_grad_(False)
    return TextConditioner(t5, tokenizer, t5.config.d_model, config.transformer_lm.dim)


def build_melody_conditioner(
    config: DictConfig, separate: Separate, sample_rate: int, device: torch.device
) -> MelodyConditioner:
    """Chroma as the checkpoint was trained with, and an empty projection to the model's width."""
    wanted = config.conditioners[MELODY].chroma_stem
    chroma = ChromaExtractor(
        sample_rate=sample_rate,
        n_chroma=wanted.n_chroma,
        radix2_exp=wanted.radix2_exp,
        **{name: wanted[name] for name in ("nfft", "winlen", "winhop", "argmax", "norm") if name in wanted},
    )
    duration_s = config.dataset.segment_duration
    return MelodyConditioner(separate, chroma.to(device), duration_s, config.transformer_lm.dim)


def conditioner_names(config: DictConfig) -> set[str]:
    """The attributes that the checkpoint is conditioned on.

    Raises:
        WeightsError: one of them is nothing that a MusicGen request has.
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


def build_lm(checkpoint: Checkpoint, conditioner: Conditioner, device: torch.device) -> LMModel:
    """audiocraft's language model around our conditioner: fp32 on a CPU, its fp16 mix on a GPU.

    Raises:
        WeightsError: the state dict does not fit the configuration.
    """
    config = checkpoint.config
    kwargs = _plain(config.transformer_lm)
    q_modeling = kwargs.pop("q_modeling", None)
    pattern = config.codebooks_pattern
    if pattern.modeling is None:
        if q_modeling is None:
            raise WeightsError("The checkpoint's configuration names no codebooks pattern.")
        delays = list(range(kwargs["n_q"]))
        pattern = OmegaConf.create({"modeling": q_modeling, "delay": {"delays": delays}})
    fuser = builders.get_condition_fuser(config)
    if fuser.fuse2cond["cross"]:
        kwargs["cross_attention"] = True
    guidance = config.classifier_free_guidance
    with torch.device("meta"), _understood(checkpoint.origin):
        lm = LMModel(
            pattern_provider=builders.get_codebooks_pattern_provider(kwargs["n_q"], pattern),
            condition_provider=nn.Module(),
            fuser=fuser,
            cfg_dropout=guidance.training_dropout,
            cfg_coef=guidance.inference_coef,
            attribute_dropout=_plain(config.attribute_dropout),
            dtype=torch.float32 if device.type == "cpu" else torch.float16,
            device="meta",
            **kwargs,
        )
    lm.condition_provider = conditioner
    _assign(lm, checkpoint, device, "language model")
    return lm.eval().requires_grad_(False)


def build_codec(checkpoint: Checkpoint, device: torch.device) -> CompressionModel:
    """EnCodec in audiocraft's spelling, fp32.

    Raises:
        WeightsError: the state dict does not fit the configuration.
    """
    checkpoint.config.device = "cpu"
    try:
        with warnings.catch_warnings():  # the checkpoints' spelling of weight norm, which torch deprecates
            warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
            codec = builders.get_compression_model(checkpoint.config)
    except KeyError as exc:
        raise WeightsError(f"The codec's configuration is not EnCodec's: {exc}") from exc
    _assign(codec, checkpoint, device, "codec")
    return codec.to(device).eval().requires_grad_(False)


def build_transformers_codec(source: Path | TransformersPart, device: torch.device) -> CompressionModel:
    """EnCodec in transformers' spelling, fp32, from its own folder or from inside a checkpoint.

    Raises:
        WeightsError: there is no such model.
    """
    from transformers import EncodecConfig, EncodecModel

    try:
        if isinstance(source, TransformersPart):
            codec = EncodecModel(EncodecConfig(**source.config))
            codec.load_state_dict(source.state)
        else:
            codec = EncodecModel.from_pretrained(source, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as exc:
        where = source.origin if isinstance(source, TransformersPart) else source
        raise WeightsError(f"{where} does not hold an EnCodec model: {first_line(exc)}") from exc
    wrapped = HFEncodecCompressionModel(codec.to(device, torch.float32))
    return wrapped.eval().requires_grad_(False)


def wrap_codec(codec: CompressionModel, config: DictConfig) -> CompressionModel:
    """The codec as a language model's configuration wants it: interleaved for stereo, so many codebooks."""
    stereo = config.get("interleave_stereo_codebooks")
    if stereo is not None and stereo.use:
        codec = InterleaveStereoCompressionModel(codec, per_timestep=stereo.get("per_timestep", False))
        if codec.per_timestep:
            raise WeightsError(
                "The checkpoint interleaves its channels in time, which no released model does."
            )
    if config.get("compression_model_n_q") is not None:
        codec.set_num_codebooks(config.compression_model_n_q)
    return codec


@contextmanager
def _understood(origin: str) -> Iterator[None]:
    """A configuration that audiocraft's constructors do not take is the checkpoint's fault."""
    try:
        yield
    except (TypeError, ValueError, AssertionError) as exc:
        raise WeightsError(
            f"{origin} has a configuration that builds no MusicGen: {first_line(exc)}"
        ) from exc


def _assign(module: nn.Module, checkpoint: Checkpoint, device: torch.device, what: str) -> None:
    """Puts the tensors in place, each in the type that the module was built with, with no second copy."""
    own = module.state_dict()
    check_fit(own, checkpoint.state, what, checkpoint.origin)
    placed = {name: checkpoint.state[name].to(device, own[name].dtype) for name in own}
    module.load_state_dict(placed, assign=True)


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}
