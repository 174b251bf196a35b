"""audiocraft's language model from a configuration, with weights that are loaded one layer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from musicgen_svc.audiocraft_compat import LMModel, builders
from musicgen_svc.checkpoints import Checkpoint
from musicgen_svc.checkpoints import field_tables as tables
from musicgen_svc.checkpoints.field_types import read_fields
from musicgen_svc.checkpoints.key_names import State
from musicgen_svc.checkpoints.tensor_checks import check_fit
from musicgen_svc.models.conditioners import Conditioner
from musicgen_svc.models.meta_init import assign_weights, configuration_errors, on_meta


class LazyLM:
    """A language model whose weights are still on disk: fp32 on a CPU, audiocraft's mix with fp16 on a GPU.

    Layers and heads are most of the weights. They are loaded one at a time so that the engine can pack each
    of them; they are never all in memory at once.
    """

    def __init__(self, config: DictConfig, origin: str, device: torch.device) -> None:
        """Builds the modules without weights; reads no tensor.

        Args:
            config: the checkpoint's configuration, in audiocraft's form.
            origin: the checkpoint's format and path, for messages.
            device: where the model will run.

        Raises:
            WeightsError: the configuration builds no MusicGen.
        """
        self.config = config
        self._device = device
        self._lm = _on_meta(config, origin, device)
        self._state: State = {}
        self._origin = origin
        layers = enumerate(self._lm.transformer.layers)
        self._prefixes: dict[nn.Module, str] = {self._lm.linears: "linears."} | {
            layer: f"transformer.layers.{i}." for i, layer in layers
        }

    @property
    def size(self) -> int:
        """Bytes of all its weights, except the few megabytes of the conditioners' projections."""
        return sum(tensor.nbytes for tensor in self._lm.state_dict().values())

    @property
    def parameter_count(self) -> int:
        """The number of its weights, except those of the conditioners' projections."""
        return sum(tensor.numel() for tensor in self._lm.state_dict().values())

    def open(self, checkpoint: Checkpoint, conditioner: Conditioner) -> LMModel:
        """Loads everything except the layers and the heads, and returns the model.

        Args:
            checkpoint: the checkpoint's tensors. The layers and the heads are read from it later.
            conditioner: replaces audiocraft's own conditioners; the checkpoint has its projections.

        Raises:
            WeightsError: the state dict does not fit the configuration, or numbers in it are not finite.
        """
        self._state, self._origin = checkpoint.state, checkpoint.origin
        self._lm.condition_provider = conditioner
        own = self._lm.state_dict()
        check_fit(own, self._state, "language model", self._origin)
        later = tuple(self._prefixes.values())
        rest = {name: tensor for name, tensor in own.items() if not name.startswith(later)}
        assign_weights(self._lm, rest, self._state, self._device, self._origin)
        return self._lm.eval().requires_grad_(False)

    @contextmanager
    def loaded(self, part: nn.Module) -> Iterator[None]:
        """Loads the weights of a layer or of the heads. On exit they are dropped unless referenced.

        Raises:
            WeightsError: numbers among them are not finite.
        """
        without_weights = part.state_dict()
        self.load(part)
        yield
        part.load_state_dict(without_weights, assign=True)

    def load(self, part: nn.Module) -> None:
        """Loads the weights of a layer or of the heads for as long as the model exists.

        Raises:
            WeightsError: numbers among them are not finite.
        """
        own, prefix = part.state_dict(), self._prefixes[part]
        state = {name: self._state[prefix + name] for name in own}
        assign_weights(part, own, state, self._device, self._origin, prefix)


def _on_meta(config: DictConfig, origin: str, device: torch.device) -> LMModel:
    """Returns audiocraft's language model for the configuration, without weights and conditioners."""
    plain = OmegaConf.to_container(config.transformer_lm, resolve=True)
    assert isinstance(plain, dict)
    fields: dict[str, Any] = {str(name): value for name, value in plain.items()}
    kwargs = read_fields(fields, tables.TRANSFORMER_LM, "transformer_lm", origin)
    q_modeling = kwargs.pop("q_modeling", None)
    pattern = config.codebooks_pattern
    if pattern.modeling is None:
        pattern = OmegaConf.create({"modeling": q_modeling, "delay": {"delays": list(range(kwargs["n_q"]))}})
    fuser = builders.get_condition_fuser(config)
    if fuser.fuse2cond["cross"]:
        kwargs["cross_attention"] = True
    with on_meta(), configuration_errors(origin, "MusicGen"):
        return LMModel(
            pattern_provider=builders.get_codebooks_pattern_provider(kwargs["n_q"], pattern),
            condition_provider=nn.Module(),
            fuser=fuser,
            dtype=torch.float32 if device.type == "cpu" else torch.float16,
            device="meta",
            **kwargs,
        )
