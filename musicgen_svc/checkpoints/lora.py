"""A PEFT LoRA adapter: `adapter_config.json` and the adapter's tensors, merged into a base model.

W += strength * alpha / r * B @ A (Hu et al., arXiv 2106.09685), or alpha / sqrt(r) for a rank-stabilized
adapter (Kalajdzievski, arXiv 2312.03732). audiocraft keeps query, key and value in one tensor: what an
adapter of transformers' model says of one of them goes into its third. Which modules it changes its tensors
say: `target_modules`, which may be a regular expression, is not read.
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
    some,
)
from musicgen_svc.checkpoints.fields import Real, shown
from musicgen_svc.checkpoints.key_names import State, plain_attention_name
from musicgen_svc.checkpoints.tensor_files import read_json, read_tensors, tensor_files
from musicgen_svc.checkpoints.transformers_names import Place, place
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
_ALPHA = Real(-1e6, 1e6)
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin a training that leave the base's weights as they are."""


class LoraFolder(OpenedCheckpoint):
    """An adapter on its base; everything but the language model's weights is the base's."""

    format = "LoRA adapter"

    def __init__(self, folder: Path, base: Callable[[str], OpenedCheckpoint], strength: float = 1.0) -> None:
        """
        Args:
            base: the name of the model that the adapter was trained on -> that model.
            strength: 0 is the base, 1 what was trained.

        Raises:
            WeightsError: it is an adapter of another kind, its files are missing, or its base is.
        """
        assert math.isfinite(strength), strength
        self.path = folder
        self._origin = f"The LoRA adapter {folder}"
        self._settings = read_json(folder / ADAPTER_CONFIG)
        self._check_kind()
        name = self._settings.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise WeightsError(
                f"{self._origin} does not name its base: base_model_name_or_path in adapter_config.json "
                f"is {name!r:.40}; it must be a model, such as facebook/musicgen-small."
            )
        own = tensor_files(folder, ADAPTER_FILES)
        self._tensors = read_tensors(own)
        if wrong := [name for name, tensor in self._tensors.items() if not tensor.is_floating_point()]:
            raise WeightsError(f"{self._origin} holds tensors that are not in floating point: {some(wrong)}.")
        self._patterns = _patterns(self._settings.get("alpha_pattern") or {}, self._origin)
        self._strength = strength
        if strength != 1:
            self.format = f"LoRA adapter at strength {strength:g}"
        self._base = base(name)
        self.files = (*self._base.files, folder / ADAPTER_CONFIG, *own)

    def config(self) -> DictConfig:
        return self._base.config()

    def codec(self) -> Checkpoint | CodecPointer | TransformersPart:
        return self._base.codec()

    def text_encoder(self) -> TransformersPart | None:
        return self._base.text_encoder()

    def lm(self) -> Checkpoint:
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
            if (target := merge.rows(f"{module}.weight", shape)) is not None:  # before the product is made
                target.copy_(target.float() + self._strength * self._delta(module, pair))
        merge.check(self._origin)
        return Checkpoint(base.config, merge.state, self._origin)

    def _check_factors(self, module: str, pair: dict[str, torch.Tensor]) -> None:
        if not {"A", "B"} <= pair.keys():
            raise WeightsError(f"{self._origin} has only one of the factors A and B of {module:.80}.")
        a, b = pair["A"], pair["B"]  # [R, in], [out, R]
        if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[0] == b.shape[1]:
            raise WeightsError(
                f"{self._origin} has factors of {module:.80} that do not go together: "
                f"A is {list(a.shape)} and B is {list(b.shape)}."
            )

    def _delta(self, module: str, pair: dict[str, torch.Tensor]) -> torch.Tensor:
        """What training added to a module's weight, fp32."""
        a, b = pair["A"].float(), pair["B"].float()
        rank = a.shape[0]  # the tensors know what rank_pattern said
        scale = self._alpha(module) / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)
        delta = (b @ a) * scale
        return delta.T if "embedding" in pair else delta  # an embedding's weight is [entries, out]

    def _alpha(self, module: str) -> float:
        """That of the first pattern that the module's name is or ends with, else `lora_alpha`."""
        places = [0, *(match.end() for match in re.finditer(r"\.", module))]
        named = [found for at in places if (found := self._patterns.get(module[at:])) is not None]
        alpha = min(named)[1] if named else self._settings.get("lora_alpha")
        if not _ALPHA.accepts(alpha):
            raise WeightsError(f"{self._origin} has lora_alpha {shown(alpha)}; it must be {_ALPHA}.")
        return float(alpha)  # type: ignore[arg-type]

    def _check_kind(self) -> None:
        kind = self._settings.get("peft_type")
        if kind != "LORA":
            raise WeightsError(f"{self._origin} is an adapter of the type {kind!r:.40}; it must be 'LORA'.")
        beyond = [name for name in _UNSUPPORTED if self._settings.get(name)]
        start = self._settings.get("init_lora_weights")
        if start not in _PLAIN_STARTS:
            beyond.append(f"init_lora_weights {start!r:.40}")
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
        """A tensor that was trained whole; in part, at another strength than 1."""
        rows = self.rows(name, tensor.shape)
        if rows is not None:
            rows.copy_(tensor if strength == 1 else torch.lerp(rows.float(), tensor.float(), strength))

    def check(self, origin: str) -> None:
        """
        Raises:
            WeightsError: some of what was merged has no place in the base.
        """
        faults = []
        if self._unexpected:
            faults.append(f"it changes {some(self._unexpected)} that the base does not have")
        if self._misshapen:
            faults.append(f"it changes {some(self._misshapen)} of another shape than the base's")
        if faults:
            raise WeightsError(f"{origin} does not fit its base: {'; '.join(faults)}.")

    def rows(self, name: str, shape: Sequence[int]) -> torch.Tensor | None:
        """The part of the state that `name` means, in transformers' spelling or audiocraft's, to write to.

        None, and a fault for `check`, if there is none, or if it has another shape.
        """
        own = plain_attention_name(name)
        target = Place(own) if own in self.state else place(name)
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


def _patterns(given: object, origin: str) -> dict[str, tuple[int, Any]]:
    """alpha_pattern: the name that each pattern means -> its place in the file, and its alpha.

    PEFT reads a pattern as a regular expression for the last parts of a module's name. A stranger's
    expression can take for ever, so only names are read: with or without the dots escaped, and with or
    without `.*\\.` before them, which means any module around it.

    Raises:
        WeightsError: one is an expression of another kind, or there is no mapping.
    """
    if not isinstance(given, dict):
        raise WeightsError(f"{origin} has alpha_pattern {shown(given)}; it must be a mapping.")
    patterns: dict[str, tuple[int, Any]] = {}
    for place_in_file, (pattern, alpha) in enumerate(given.items()):
        name = str(pattern).removeprefix(r".*\.").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.-]{1,1000}", name):
            raise WeightsError(
                f"{origin} has the alpha_pattern {shown(pattern)}, a regular expression, which is not read: "
                "write out the names of the modules or the last parts of them."
            )
        if not _ALPHA.accepts(alpha):
            raise WeightsError(
                f"{origin} has lora_alpha {shown(alpha)} in alpha_pattern; it must be {_ALPHA}."
            )
        patterns.setdefault(name, (place_in_file, alpha))
    return patterns
