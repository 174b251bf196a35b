"""audiocraft's configurations as checkpoints hold them -> plain ones that a model is built from."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from musicgen_svc.checkpoints.opened import component_name
from musicgen_svc.errors import WeightsError, first_line

_LM_SECTIONS = (
    "transformer_lm", "codebooks_pattern", "classifier_free_guidance", "fuser", "conditioners", "dataset",
)  # fmt: skip
_DROPPED = (
    ("self_wav", "chroma_stem", "cache_path"), ("args", "merge_text_conditions_p"), ("args", "drop_desc_p"),
)  # fmt: skip
"""Under `conditioners`: the trainer's own paths and augmentations."""
_CALL = re.compile(r"\$\{(?!\s*[\w.\[\]-]+\s*\})")
"""Any `${` but a plain reference: a resolver may be called by a name that is itself put together."""


def codec_config(source: Any, origin: str) -> DictConfig:
    """A codec's `xp.cfg`, as a fresh and open DictConfig.

    Raises:
        WeightsError: it is no configuration.
    """
    return OmegaConf.create(_plain(source, origin))


def lm_config(source: Any, origin: str) -> DictConfig:
    """A language model's `xp.cfg`, as a fresh and open DictConfig, without what only its training needed.

    Args:
        source: a YAML string, OmegaConf's object or a plain dict.

    Raises:
        WeightsError: it is another kind of model's, incomplete or no configuration at all.
    """
    plain = _plain(source, origin)
    kind = plain.get("lm_model", "transformer_lm")
    if kind != "transformer_lm":
        raise WeightsError(f"{origin} is a {kind!r:.80}; a MusicGen is a 'transformer_lm'.")
    missing = [name for name in _LM_SECTIONS if not isinstance(plain.get(name), dict)]
    if missing:
        raise WeightsError(f"{origin} holds a configuration without {', '.join(missing)}.")
    plain["attribute_dropout"] = plain.get("attribute_dropout") or {}
    for *sections, key in _DROPPED:
        holder = plain["conditioners"]
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(key, None)
    # One attention module for all: every spelling of it computes the same, this one has the plain names.
    plain["transformer_lm"] |= {"memory_efficient": True, "custom": False, "checkpointing": "none"}
    config = OmegaConf.create(plain)
    try:
        for section in _LM_SECTIONS:
            OmegaConf.to_container(config[section], resolve=True)
        for conditioner in config.conditioners.values():
            if isinstance(conditioner, DictConfig) and isinstance(conditioner.get("t5"), DictConfig):
                component_name(conditioner.t5.get("name"))
    except OmegaConfBaseException as exc:
        raise WeightsError(f"{origin} holds a configuration that cannot be read: {first_line(exc)}") from exc
    return config


def _plain(source: Any, origin: str) -> dict[str, Any]:
    try:
        plain = _inert(OmegaConf.to_container(OmegaConf.create(source), resolve=False))
    except Exception as exc:  # YAML's errors, OmegaConf's, and those of a half-restored object
        raise WeightsError(f"{origin} holds a configuration that cannot be read: {first_line(exc)}") from exc
    if not isinstance(plain, dict):
        raise WeightsError(f"{origin} holds a configuration that is a {type(plain).__name__}, not a mapping.")
    return plain


def _inert(value: Any) -> Any:
    """Leaves references to other entries, and breaks calls: `${oc.env:…}` reads our environment."""
    if isinstance(value, dict):
        return {key: _inert(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_inert(item) for item in value]
    return value.replace("$", "") if isinstance(value, str) and _CALL.search(value) else value
