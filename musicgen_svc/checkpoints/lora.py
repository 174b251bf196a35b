"""A PEFT LoRA adapter: `adapter_config.json` and the adapter's tensors, merged into a base model.

W += strength * alpha / r * B @ A (Hu et al., arXiv 2106.09685), or alpha / sqrt(r) for a rank-stabilized
adapter (Kalajdzievski, arXiv 2312.03732). audiocraft keeps query, key and value in one tensor: what an
adapter of transformers' model says of one of them goes into its third.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig

from musicgen_svc.checkpoints.opened import (
    Checkpoint,
    CodecPointer,
    OpenedCheckpoint,
    TransformersPart,
    some,
)
from musicgen_svc.checkpoints.spelling import State, plain_attention_name
from musicgen_svc.checkpoints.tensors import read_json, read_tensors, tensor_files
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
            merge.add(f"{module}.weight", self._strength * self._delta(module, pair))
        merge.check(self._origin)
        return Checkpoint(base.config, merge.state, self._origin)

    def _delta(self, module: str, pair: dict[str, torch.Tensor]) -> torch.Tensor:
        """What training added to a module's weight, fp32."""
        if not {"A", "B"} <= pair.keys():
            raise WeightsError(f"{self._origin} has only one of the factors A and B of {module}.")
        a, b = pair["A"].float(), pair["B"].float()  # [R, in], [out, R]
        if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[0] == b.shape[1]:
            raise WeightsError(
                f"{self._origin} has factors of {module} that do not go together: "
                f"A is {list(a.shape)} and B is {list(b.shape)}."
            )
        rank = a.shape[0]  # the tensors know what rank_pattern said
        scale = self._alpha(module) / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)
        delta = (b @ a) * scale
        return delta.T if "embedding" in pair else delta  # an embedding's weight is [entries, out]

    def _alpha(self, module: str) -> float:
        patterns = self._settings.get("alpha_pattern") or {}
        alpha = self._settings.get("lora_alpha")
        for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
            if _names(pattern, module):
                alpha = own
                break
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise WeightsError(f"{self._origin} has lora_alpha {alpha!r:.40}; it must be a number.")
        return float(alpha)

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

    def add(self, name: str, delta: torch.Tensor) -> None:
        """W += delta."""
        rows = self._rows(name, delta)
        if rows is not None:
            rows.copy_(rows.float() + delta)

    def replace(self, name: str, tensor: torch.Tensor, strength: float) -> None:
        """A tensor that was trained whole; in part, at another strength than 1."""
        rows = self._rows(name, tensor)
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

    def _rows(self, name: str, like: torch.Tensor) -> torch.Tensor | None:
        """The part of the state that `name` means, in transformers' spelling or audiocraft's."""
        own = plain_attention_name(name)
        target = Place(own) if own in self.state else place(name)
        if target is None or target.key not in self.state:
            self._unexpected.append(name)
            return None
        whole = self.state[target.key]
        height = whole.shape[0] if target.third is None else whole.shape[0] // 3
        if like.shape != (height, *whole.shape[1:]):
            self._misshapen.append(name)
            return None
        if target.key not in self._copied:
            whole = self.state[target.key] = whole.clone()
            self._copied.add(target.key)
        return whole if target.third is None else whole[target.third * height :][:height]


def _names(pattern: str, module: str) -> bool:
    """Whether a pattern means a module: as PEFT reads it, an expression for the last parts of its name.

    Raises:
        WeightsError: the expression could take for ever, or is none.
    """
    if len(re.findall(r"[*+{]", pattern)) > 4 or re.search(r"\)[*+?{]", pattern):
        raise WeightsError(f"The adapter's alpha_pattern {pattern!r:.80} is too complex: write names out.")
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None
    except re.error as exc:
        raise WeightsError(f"The adapter's alpha_pattern {pattern!r:.80} is no expression: {exc}.") from exc
