"""Configurations and state dicts -> audiocraft's or transformers' EnCodec, in fp32."""

import warnings
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from musicgen_svc.audiocraft_compat import (
    CompressionModel,
    HFEncodecCompressionModel,
    InterleaveStereoCompressionModel,
    builders,
)
from musicgen_svc.checkpoints import Checkpoint, TransformersPart
from musicgen_svc.checkpoints.key_names import parametrized_weight_norm
from musicgen_svc.checkpoints.part_configs import encodec_fields
from musicgen_svc.checkpoints.tensor_checks import check_fit
from musicgen_svc.checkpoints.transformers_part import read_transformers_part
from musicgen_svc.errors import WeightsError
from musicgen_svc.models.conditioners import MELODY
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.meta_init import assign_weights, configuration_errors, on_meta

_MIN_WINDOW_FRAMES = 2
"""A window after the first begins with at least one known frame and adds at least one new frame."""


def read_encodec(folder: Path) -> TransformersPart:
    """Reads a folder of transformers' `EncodecModel`, such as facebook/encodec_32khz.

    Raises:
        WeightsError: the folder holds another model, or its files are missing or damaged.
    """
    part = read_transformers_part(folder)
    found = part.config.get("model_type")
    if found != "encodec":
        raise WeightsError(f"{folder} does not hold an EnCodec model: its type is {found!r:.40}.")
    return TransformersPart(part.config, parametrized_weight_norm(part.state), part.origin, part.files)


def build_codec(source: Checkpoint | TransformersPart, device: torch.device) -> CompressionModel:
    """Builds EnCodec from audiocraft's form of it (`Checkpoint`) or from transformers'.

    Raises:
        WeightsError: the configuration builds no EnCodec, the state dict does not fit it, or numbers in the
            state dict are not finite.
    """
    if isinstance(source, TransformersPart):
        return _build_transformers_codec(source, device)
    source.config.device = "meta"
    with on_meta(), warnings.catch_warnings(), configuration_errors(source.origin, "EnCodec"):
        # audiocraft's checkpoints have the older form of weight norm, which torch deprecates.
        warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
        codec = builders.get_compression_model(source.config)
    _load(codec, source, device)
    return codec.eval().requires_grad_(False)


def _build_transformers_codec(part: TransformersPart, device: torch.device) -> CompressionModel:
    from transformers import EncodecConfig, EncodecModel

    fields = encodec_fields(part.config, part.origin)
    with on_meta(), configuration_errors(part.origin, "EnCodec"):
        codec = EncodecModel(EncodecConfig(**fields))
    _load(codec, part, device)
    _restore_constants(codec)
    return HFEncodecCompressionModel(codec).eval().requires_grad_(False)


def _load(codec: nn.Module, source: Checkpoint | TransformersPart, device: torch.device) -> None:
    """Assigns the source's tensors to a codec that was built without weights."""
    own = codec.state_dict()
    check_fit(own, source.state, "codec", source.origin)
    assign_weights(codec, own, source.state, device, source.origin)


def _restore_constants(codec: nn.Module) -> None:
    """Sets the constants of transformers' convolutions, which are in no state dict.

    They stay on the host: transformers computes the padding from them on the host, and would wait for the GPU
    before each convolution.
    """
    for module in codec.modules():
        if {"stride", "kernel_size", "padding_total"} <= module._buffers.keys():
            conv = module.conv
            assert isinstance(conv, nn.Conv1d)
            dilated_size = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
            module.stride = torch.tensor(conv.stride[0])
            module.kernel_size = torch.tensor(dilated_size)
            module.padding_total = torch.tensor(dilated_size - conv.stride[0])
    assert not any(buffer.is_meta for buffer in codec.buffers())


def codec_for(config: DictConfig, shared: CompressionModel, origin: str) -> Codec:
    """Returns the codec of a language model.

    Args:
        config: the checkpoint's configuration, in audiocraft's form.
        shared: the codec's modules, which other models may use, too.
        origin: the checkpoint's format and path, for messages.

    Raises:
        WeightsError: it is not the codec that the language model was trained for.
    """
    codec = Codec(adapted(shared, config))
    _check(origin, config, codec)
    return codec


def adapted(codec: CompressionModel, config: DictConfig) -> CompressionModel:
    """Adapts a codec to the configuration of a language model: stereo, and the number of codebooks.

    Raises:
        WeightsError: the codec cannot be used as the configuration says.
    """
    stereo = config.get("interleave_stereo_codebooks")
    if stereo is not None and stereo.use:
        if codec.channels != 1:
            raise WeightsError(
                f"The checkpoint interleaves two channels of one each, and its codec has {codec.channels}."
            )
        codec = InterleaveStereoCompressionModel(codec, per_timestep=stereo.get("per_timestep", False))
        if codec.per_timestep:
            raise WeightsError(
                "The checkpoint interleaves its channels in time, which no released model does."
            )
    codebooks = config.get("compression_model_n_q")
    if codebooks is not None:
        try:
            codec.set_num_codebooks(codebooks)
        except (AssertionError, ValueError) as exc:
            raise WeightsError(
                f"The checkpoint has compression_model_n_q {codebooks}, which its codec cannot have."
            ) from exc
    return codec


def _check(origin: str, config: DictConfig, codec: Codec) -> None:
    """Checks that a codec is the one that a language model was trained for, as far as their sizes tell.

    Args:
        origin: the checkpoint's format and path, for messages.
        config: the checkpoint's configuration, in audiocraft's form.
        codec: the codec, adapted to the configuration.

    Raises:
        WeightsError: the codec is another one, or the model's window is too short to continue any audio.
    """
    wanted = (config.transformer_lm.n_q, config.transformer_lm.card)
    if wanted != (codec.codebooks, codec.cardinality):
        raise WeightsError(
            f"{origin} was trained for {wanted[0]} codebooks of {wanted[1]} "
            f"entries, and its codec has {codec.codebooks} of {codec.cardinality}."
        )
    if MELODY in config.conditioners and config.sample_rate != codec.sample_rate:
        raise WeightsError(
            f"{origin} follows melodies at {config.sample_rate} Hz, and its codec is at "
            f"{codec.sample_rate} Hz."
        )
    frames = int(config.dataset.segment_duration * codec.frame_rate)
    if frames < _MIN_WINDOW_FRAMES:
        raise WeightsError(
            f"{origin} has dataset.segment_duration {config.dataset.segment_duration} s, which is {frames} "
            f"frames of its codec; it must be {_MIN_WINDOW_FRAMES} at least."
        )
