"""Configurations and state dicts -> audiocraft's modules on the device, weights assigned once."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from musicgen_svc.audiocraft_compat import (
    CompressionModel,
    HFEncodecCompressionModel,
    InterleaveStereoCompressionModel,
    LMModel,
    builders,
)
from musicgen_svc.checkpoints import Checkpoint, TransformersPart
from musicgen_svc.checkpoints import field_tables as tables
from musicgen_svc.checkpoints.field_types import read_fields
from musicgen_svc.checkpoints.key_names import State, parametrized_weight_norm
from musicgen_svc.checkpoints.part_configs import encodec_fields
from musicgen_svc.checkpoints.tensor_checks import check_finite, check_fit
from musicgen_svc.checkpoints.tensor_files import TRANSFORMERS_FILES, read_json, read_tensors, tensor_files
from musicgen_svc.errors import WeightsError, first_line
from musicgen_svc.models.chroma import Chroma
from musicgen_svc.models.conditioners import MELODY, TEXT, Conditioner, MelodyConditioner, Separate
from musicgen_svc.models.meta_init import on_meta


def build_melody_conditioner(
    config: DictConfig, separate: Separate, sample_rate: int, device: torch.device
) -> MelodyConditioner:
    """Chroma as the checkpoint was trained with, and an empty projection to the model's width."""
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


class LMDraft:
    """A language model whose weights are still on disk.

    What is nearly all of it, its layers and its heads, an engine needs one by one, to pack it. So these
    parts are lent, and never all there at once.
    """

    def __init__(self, lm: LMModel, config: DictConfig, device: torch.device) -> None:
        self._lm, self.config, self._device = lm, config, device
        self._state: State = {}
        self._origin = ""
        layers = enumerate(lm.transformer.layers)
        self._lent = {lm.linears: "linears.", **{layer: f"transformer.layers.{i}." for i, layer in layers}}

    @property
    def size(self) -> int:
        """Bytes that its weights will take, without the few megabytes of the conditioners' projections."""
        return sum(tensor.nbytes for tensor in self._lm.state_dict().values())

    def begin(self, checkpoint: Checkpoint, conditioner: Conditioner) -> LMModel:
        """The model without what is lent, around our conditioner, whose projections are in the checkpoint.

        Raises:
            WeightsError: the state dict does not fit the configuration, or numbers in it are not finite.
        """
        self._state, self._origin = checkpoint.state, checkpoint.origin
        self._lm.condition_provider = conditioner
        own = self._lm.state_dict()
        check_fit(own, self._state, "language model", checkpoint.origin)
        rest = {name: tensor for name, tensor in own.items() if not name.startswith((*self._lent.values(),))}
        _assign(self._lm, rest, self._state, self._device, checkpoint.origin)
        return self._lm.eval().requires_grad_(False)

    @contextmanager
    def lend(self, part: nn.Module) -> Iterator[None]:
        """Within, a layer or the heads have their weights. What is to stay somebody else holds then.

        Raises:
            WeightsError: numbers among them are not finite.
        """
        own = part.state_dict()
        self.fill(part)
        yield
        part.load_state_dict(own, assign=True)

    def fill(self, part: nn.Module) -> None:
        own, prefix = part.state_dict(), self._lent[part]
        state = {name: self._state[prefix + name] for name in own}
        _assign(part, own, state, self._device, self._origin, prefix)

    def fill_all(self) -> None:
        for part in self._lent:
            self.fill(part)


def draft_lm(config: DictConfig, origin: str, device: torch.device) -> LMDraft:
    """audiocraft's language model, nothing of it read yet: fp32 on a CPU, its fp16 mix on a GPU.

    Raises:
        WeightsError: the configuration builds no MusicGen.
    """
    kwargs = read_fields(_plain(config.transformer_lm), tables.TRANSFORMER_LM, "transformer_lm", origin)
    q_modeling = kwargs.pop("q_modeling", None)
    pattern = config.codebooks_pattern
    if pattern.modeling is None:
        pattern = OmegaConf.create({"modeling": q_modeling, "delay": {"delays": list(range(kwargs["n_q"]))}})
    fuser = builders.get_condition_fuser(config)
    if fuser.fuse2cond["cross"]:
        kwargs["cross_attention"] = True
    with on_meta(), _understood(origin, "MusicGen"):
        lm = LMModel(
            pattern_provider=builders.get_codebooks_pattern_provider(kwargs["n_q"], pattern),
            condition_provider=nn.Module(),
            fuser=fuser,
            dtype=torch.float32 if device.type == "cpu" else torch.float16,
            device="meta",
            **kwargs,
        )
    return LMDraft(lm, config, device)


def build_lm(checkpoint: Checkpoint, conditioner: Conditioner, device: torch.device) -> LMModel:
    """What `draft_lm` drafts, built at once.

    Raises:
        WeightsError: the state dict does not fit the configuration.
    """
    draft = draft_lm(checkpoint.config, checkpoint.origin, device)
    lm = draft.begin(checkpoint, conditioner)
    draft.fill_all()
    return lm


def build_codec(checkpoint: Checkpoint, device: torch.device) -> CompressionModel:
    """EnCodec in audiocraft's spelling, fp32.

    Raises:
        WeightsError: the state dict does not fit the configuration.
    """
    checkpoint.config.device = "meta"
    with on_meta(), warnings.catch_warnings(), _understood(checkpoint.origin, "EnCodec"):
        # The checkpoints' spelling of weight norm, which torch deprecates.
        warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
        codec = builders.get_compression_model(checkpoint.config)
    own = codec.state_dict()
    check_fit(own, checkpoint.state, "codec", checkpoint.origin)
    _assign(codec, own, checkpoint.state, device, checkpoint.origin)
    return codec.eval().requires_grad_(False)


def build_transformers_codec(part: TransformersPart, device: torch.device) -> CompressionModel:
    """EnCodec in transformers' spelling, fp32.

    Raises:
        WeightsError: the state dict does not fit the configuration.
    """
    from transformers import EncodecConfig, EncodecModel

    fields = encodec_fields(part.config, part.origin)
    with on_meta(), _understood(part.origin, "EnCodec"):
        codec = EncodecModel(EncodecConfig(**fields))
    own = codec.state_dict()
    check_fit(own, part.state, "codec", part.origin)
    _assign(codec, own, part.state, device, part.origin)
    _restore_constants(codec)
    return HFEncodecCompressionModel(codec).eval().requires_grad_(False)


def codec_in(folder: Path) -> TransformersPart:
    """A folder of transformers' `EncodecModel`, such as facebook/encodec_32khz.

    Raises:
        WeightsError: it is none.
    """
    config = folder / "config.json"
    own = read_json(config)
    if own.get("model_type") != "encodec":
        raise WeightsError(
            f"{folder} does not hold an EnCodec model: its type is {own.get('model_type')!r:.40}."
        )
    files = tensor_files(folder, TRANSFORMERS_FILES)
    state = parametrized_weight_norm(read_tensors(files))
    return TransformersPart(own, state, str(folder), (config, *files))


def wrap_codec(codec: CompressionModel, config: DictConfig) -> CompressionModel:
    """The codec as a language model's configuration wants it: interleaved for stereo, so many codebooks."""
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


@contextmanager
def _understood(origin: str, what: str) -> Iterator[None]:
    """A configuration that a library's constructors do not take is the checkpoint's fault."""
    try:
        yield
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, ArithmeticError) as exc:
        raise WeightsError(f"{origin} has a configuration that builds no {what}: {first_line(exc)}") from exc


def _assign(
    module: nn.Module, own: State, state: State, device: torch.device, origin: str, prefix: str = ""
) -> None:
    """Puts the tensors in place, each in the type that the module was drafted with, with no second copy.

    Args:
        own: those of the module's own, on the meta device, that are to be filled.
        origin: the checkpoint's format and path, for messages.
        prefix: what the names begin with in the checkpoint.

    Raises:
        WeightsError: numbers among them are not finite, in that type.
    """
    placed = {name: state[name].to(device, tensor.dtype) for name, tensor in own.items()}
    check_finite(((prefix + name, tensor) for name, tensor in placed.items()), origin)
    module.load_state_dict(placed, strict=False, assign=True)
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part.flatten_parameters()  # on a GPU cuDNN else copies them together, and warns, at every call


def _restore_constants(codec: nn.Module) -> None:
    """What transformers' EnCodec knows of its convolutions is in no state dict.

    It stays on the host, which pads by it, and would wait for a GPU's answer before each convolution.
    """
    for module in codec.modules():
        if {"stride", "kernel_size", "padding_total"} <= module._buffers.keys():
            conv = module.conv
            assert isinstance(conv, nn.Conv1d)
            reach = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
            module.stride = torch.tensor(conv.stride[0])
            module.kernel_size = torch.tensor(reach)
            module.padding_total = torch.tensor(reach - conv.stride[0])
    assert not any(buffer.is_meta for buffer in codec.buffers())


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}
