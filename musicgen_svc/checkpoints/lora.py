"""Merges a PEFT LoRA adapter, `adapter_config.json` and the adapter's tensors, into its base model.

W += strength * alpha / r * B @ A (Hu et al., arXiv 2106.09685), or alpha / sqrt(r) for a rank-stabilized
adapter (Kalajdzievski, arXiv 2312.03732). audiocraft keeps query, key and value in one tensor, and
transformers keeps three tensors. A change of one of the three is added to a third of audiocraft's tensor. The
names of the adapter's tensors determine which modules it changes: `target_modules`, which may be a regular
expression, is not read.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from musicgen_svc.checkpoints.base import (
    Checkpoint,
    CodecPointer,
    OpenedCheckpoint,
    TransformersPart,
)
from musicgen_svc.checkpoints.field_types import Number, quoted
from musicgen_svc.checkpoints.key_names import State, plain_attention_name
from musicgen_svc.checkpoints.tensor_checks import summarize_tensors
from musicgen_svc.checkpoints.tensor_files import read_json, read_tensors, tensor_files
from musicgen_svc.checkpoints.transformers_names import Target, target_of
from musicgen_svc.errors import WeightsError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.)")
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
    "velora_config",
)  # fmt: skip
_ALPHA = Number(-1e6, 1e6)
_PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base's weights unchanged."""


class LoraFolder(OpenedCheckpoint):
    """An adapter with its base model. All but the language model's weights is the base model's."""

    format = "LoRA adapter"

    def __init__(self, folder: Path, base: Callable[[str], OpenedCheckpoint], strength: float = 1.0) -> None:
        """Reads the adapter's settings, maps its tensors and opens its base model.

        Args:
            base: opens the model that the adapter was trained on, by its name.
            strength: 0 gives the base model, 1 the trained one.

        Raises:
            WeightsError: it is not a LoRA adapter, or its files or its base model are missing.
        """
        assert math.isfinite(strength), strength
        self.path = folder
        self._origin = f"The LoRA adapter {folder}"
        self._settings = read_json(folder / ADAPTER_CONFIG)
        self._check_type()
        name = self._settings.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise WeightsError(
                f"{self._origin} does not name its base: base_model_name_or_path in adapter_config.json "
                f"is {name!r:.40}; it must be a model, such as facebook/musicgen-small."
            )
        files = tensor_files(folder, ADAPTER_FILES)
        self._tensors = read_tensors(files)
        if wrong := [name for name, tensor in self._tensors.items() if not tensor.is_floating_point()]:
            raise WeightsError(
                f"{self._origin} holds tensors that are not in floating point: {summarize_tensors(wrong)}."
            )
        self._alphas = _read_alpha_pattern(self._settings.get("alpha_pattern") or {}, self._origin)
        self._strength = strength
        if strength != 1:
            self.format = f"LoRA adapter at strength {strength:g}"
        self._base = base(name)
        self.files = (*self._base.files, folder / ADAPTER_CONFIG, *files)

    def config(self) -> DictConfig:
        """The base model's configuration."""
        return self._base.config()

    def codec(self) -> Checkpoint | CodecPointer | TransformersPart:
        """The base model's codec."""
        return self._base.codec()

    def text_encoder(self) -> TransformersPart | None:
        """The base model's text encoder."""
        return self._base.text_encoder()

    def lm(self) -> Checkpoint:
        """The language model: the base model's, with the adapter merged into it.

        Raises:
            WeightsError: the adapter's tensors are incomplete, or do not fit the base model.
        """
        base = self._base.lm()
        merge = _Merge(base.state)
        factors: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in self._tensors.items():
            name = key.removeprefix("base_model.model.")
            if factor := _FACTOR.fullmatch(name):
                module, embedding, side = factor[1], factor[2], factor[3]
                factors.setdefault(module, {})[side] = tensor
                if embedding:
                    factors[module]["embedding"] = tensor
            else:
                merge.replace(_WRAPPERS.sub("", name), tensor, self._strength)
        for module, pair in factors.items():
            self._check_factors(module, pair)
            rows, columns = pair["B"].shape[0], pair["A"].shape[1]
            shape = (columns, rows) if "embedding" in pair else (rows, columns)
            # The shape is checked before the product is computed: small factors can have a huge product.
            if (target := merge.rows(f"{module}.weight", shape)) is not None:
                target.copy_(target.float() + self._strength * self._delta(module, pair))
        merge.check(self._origin)
        return Checkpoint(base.config, merge.state, self._origin)

    def _check_factors(self, module: str, pair: dict[str, torch.Tensor]) -> None:
        """Checks that both factors of a module are there, and can be multiplied."""
        if not {"A", "B"} <= pair.keys():
            raise WeightsError(f"{self._origin} has only one of the factors A and B of {module:.80}.")
        a, b = pair["A"], pair["B"]  # [R, in], [out, R]
        if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[0] == b.shape[1]:
            raise WeightsError(
                f"{self._origin} has factors of {module:.80} that do not go together: "
                f"A is {list(a.shape)} and B is {list(b.shape)}."
            )

    def _delta(self, module: str, pair: dict[str, torch.Tensor]) -> torch.Tensor:
        """What training added to a module's weight [out, in], in fp32."""
        a, b = pair["A"].float(), pair["B"].float()
        rank = a.shape[0]  # includes the effect of rank_pattern
        scale = self._alpha(module) / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)
        delta = (b @ a) * scale
        return delta.T if "embedding" in pair else delta  # an embedding's weight is [entries, out]

    def _alpha(self, module: str) -> float:
        """The alpha of the first pattern that is the end of the module's name, else `lora_alpha`."""
        starts = [0, *(match.end() for match in re.finditer(r"\.", module))]
        matching = [found for start in starts if (found := self._alphas.get(module[start:])) is not None]
        alpha = min(matching)[1] if matching else self._settings.get("lora_alpha")
        if not _ALPHA.accepts(alpha):
            raise WeightsError(f"{self._origin} has lora_alpha {quoted(alpha)}; it must be {_ALPHA}.")
        return float(alpha)  # type: ignore[arg-type]

    def _check_type(self) -> None:
        """Refuses adapters of other types, and those whose settings LoRA alone does not have.

        Raises:
            WeightsError: the message names the type or the settings.
        """
        peft_type = self._settings.get("peft_type")
        if peft_type != "LORA":
            raise WeightsError(
                f"{self._origin} is an adapter of the type {peft_type!r:.40}; it must be 'LORA'."
            )
        beyond = [name for name in _UNSUPPORTED if self._settings.get(name)]
        initialization = self._settings.get("init_lora_weights")
        if initialization not in _PLAIN_INITIALIZATIONS:
            beyond.append(f"init_lora_weights {initialization!r:.40}")
        if beyond:
            raise WeightsError(
                f"{self._origin} uses {' and '.join(beyond)}, which is more than LoRA: merge it into its "
                "base with PEFT's merge_and_unload and save the whole model."
            )


class _Merge:
    """A state dict whose tensors are copied when they are first written to."""

    def __init__(self, base: State) -> None:
        self.state = dict(base)
        self._copied: set[str] = set()
        self._unexpected: list[str] = []
        self._misshapen: list[str] = []

    def replace(self, name: str, tensor: torch.Tensor, strength: float) -> None:
        """Replaces a tensor that was trained as a whole, or interpolates if `strength` is not 1."""
        rows = self.rows(name, tensor.shape)
        if rows is not None:
            rows.copy_(tensor if strength == 1 else torch.lerp(rows.float(), tensor.float(), strength))

    def check(self, origin: str) -> None:
        """Reports the tensors that could not be merged.

        Raises:
            WeightsError: there are some; the base has no such tensors, or they have other shapes there.
        """
        faults = []
        if self._unexpected:
            faults.append(f"it changes {summarize_tensors(self._unexpected)} that the base does not have")
        if self._misshapen:
            faults.append(f"it changes {summarize_tensors(self._misshapen)} of another shape than the base's")
        if faults:
            raise WeightsError(f"{origin} does not fit its base: {'; '.join(faults)}.")

    def rows(self, name: str, shape: Sequence[int]) -> torch.Tensor | None:
        """A writable view of the rows that a tensor's name, of transformers or of audiocraft, means.

        None if the state has no such tensor or one of another shape, which `check` then reports.
        """
        own_name = plain_attention_name(name)
        target = Target(own_name) if own_name in self.state else target_of(name)
        if target is None or target.key not in self.state:
            self._unexpected.append(name)
            return None
        whole = self.state[target.key]
        parts = 1 if target.third is None else 3
        height = whole.shape[0] // parts if whole.ndim else 0
        if tuple(shape) != (height, *whole.shape[1:]):
            self._misshapen.append(name)
            return None
        if target.key not in self._copied:
            whole = self.state[target.key] = whole.clone()
            self._copied.add(target.key)
        return whole if target.third is None else whole[target.third * height :][:height]


def _read_alpha_pattern(setting: object, origin: str) -> dict[str, tuple[int, Any]]:
    """Reads `alpha_pattern`: the end of a module's name -> the pattern's index in the file, and its alpha.

    PEFT reads a pattern as a regular expression for the last parts of a module's name. Matching an untrusted
    expression can take for ever. Therefore only names are read: with or without escaped dots, and with or
    without `.*\\.` before them, which means any module around the named one.

    Raises:
        WeightsError: a pattern is another expression than a name, or the setting is not a mapping.
    """
    if not isinstance(setting, dict):
        raise WeightsError(f"{origin} has alpha_pattern {quoted(setting)}; it must be a mapping.")
    patterns: dict[str, tuple[int, Any]] = {}
    for index, (pattern, alpha) in enumerate(setting.items()):
        name = str(pattern).removeprefix(r".*\.").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.-]{1,1000}", name):
            raise WeightsError(
                f"{origin} has the alpha_pattern {quoted(pattern)}, a regular expression, which is not read: "
                "write out the names of the modules or the last parts of them."
            )
        if not _ALPHA.accepts(alpha):
            raise WeightsError(
                f"{origin} has lora_alpha {quoted(alpha)} in alpha_pattern; it must be {_ALPHA}."
            )
        patterns.setdefault(name, (index, alpha))
    return patterns
