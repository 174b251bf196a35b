"""audiocraft's configurations as checkpoints hold them -> plain ones that a model is built from.

Kinds and ranges of single fields are in `known_fields.py`; what several of them must satisfy together
is here.
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

import musicgen_svc.checkpoints.known_fields as known
from musicgen_svc.checkpoints.base import component_name
from musicgen_svc.checkpoints.expansion import dangling, expanded, inert
from musicgen_svc.checkpoints.fields import checked, shown
from musicgen_svc.errors import WeightsError

_LM_SECTIONS = (
    "transformer_lm", "codebooks_pattern", "classifier_free_guidance", "fuser", "conditioners", "dataset",
)  # fmt: skip
_DROPPED = (
    ("self_wav", "chroma_stem", "cache_path"), ("args", "merge_text_conditions_p"), ("args", "drop_desc_p"),
)  # fmt: skip
"""Under `conditioners`: the trainer's own paths and augmentations."""
_MAX_CHROMA_FRAMES = 4096  # 235 in the released models


def plain_config(source: Any, origin: str) -> DictConfig:
    """Any configuration as a fresh and open DictConfig, its references resolved, its calls taken apart.

    Raises:
        WeightsError: it is no configuration, or expands beyond the bounds of `expansion.py`.
    """
    return OmegaConf.create(inert(expanded(source, origin)))


def codec_config(source: Any, origin: str) -> DictConfig:
    """A codec's `xp.cfg`, as a fresh and open DictConfig of the fields that build it.

    Raises:
        WeightsError: it is no configuration, none of EnCodec's, or out of its bounds.
    """
    plain = expanded(source, origin)
    config = checked(plain, known.CODEC, "", origin, others=True)
    config["encodec"] = checked(plain.get("encodec"), known.ENCODEC, "encodec", origin)
    config["rvq"] = checked(plain.get("rvq"), known.RVQ, "rvq", origin)
    seanet = plain.get("seanet")
    common = dict(seanet) if isinstance(seanet, dict) else {}
    own = {side: common.pop(side, None) or {} for side in ("encoder", "decoder")}
    config["seanet"] = checked(common, known.SEANET, "seanet", origin)
    for side, table in (("encoder", known.SEANET), ("decoder", known.SEANET_DECODER)):
        config["seanet"][side] = checked(own[side], table, f"seanet.{side}", origin)
        stack = config["seanet"] | config["seanet"][side]
        check_stack(
            origin,
            rate_hz=config["encodec"]["sample_rate"],
            ratios=stack.get("ratios", [8, 5, 4, 2]),
            filters=stack.get("n_filters", 32),
            compress=stack.get("compress", 2),
            dilation=stack.get("dilation_base", 2) ** max(0, stack.get("n_residual_layers", 3) - 1),
        )
    sides = [config["seanet"] | config["seanet"][side] for side in ("encoder", "decoder")]
    for name in ("dimension", "ratios", "channels"):
        values = [side.get(name) for side in sides]
        if values[0] != values[1]:
            raise WeightsError(
                f"{origin} has seanet.{name} {shown(values)} for encoder and decoder; they must be equal."
            )
    channels = sides[0].get("channels", 1), config["encodec"]["channels"]
    if channels[0] != channels[1]:
        raise WeightsError(
            f"{origin} has seanet.channels {channels[0]} and encodec.channels {channels[1]}; "
            "they must be equal."
        )
    return OmegaConf.create(config)


def check_stack(
    origin: str, *, rate_hz: int, ratios: list[int], filters: int, compress: int, dilation: int
) -> None:
    """What the layers of any EnCodec must satisfy together.

    Args:
        dilation: of the last residual layer of a block.

    Raises:
        WeightsError: they are too wide, look too far, or make no whole number of frames a second.
    """
    hop = 1
    for ratio in ratios:
        hop *= ratio
    width = filters * 2 ** len(ratios)
    if width > known.MAX_TENSOR_WIDTH:
        raise WeightsError(
            f"{origin} has a codec with layers of {width} channels; at most {known.MAX_TENSOR_WIDTH} "
            "are accepted."
        )
    if dilation > known.MAX_DILATION:
        raise WeightsError(
            f"{origin} has a codec with a dilation of {dilation}; at most {known.MAX_DILATION} is accepted."
        )
    if filters // compress < 1:
        raise WeightsError(
            f"{origin} has a codec that compresses {filters} channels by {compress}, which leaves none."
        )
    if not 1 <= rate_hz // hop <= known.MAX_FRAMES_PER_S:
        raise WeightsError(
            f"{origin} has a codec of {rate_hz} Hz with frames of {hop} samples; "
            f"it must make 1 to {known.MAX_FRAMES_PER_S} frames a second."
        )


def lm_config(source: Any, origin: str) -> DictConfig:
    """A language model's `xp.cfg`, as a fresh and open DictConfig, without what only its training needed.

    Args:
        source: a YAML string, OmegaConf's object or a plain dict.

    Raises:
        WeightsError: it is another kind of model's, incomplete, out of its bounds or no configuration at all.
    """
    plain = expanded(source, origin)
    kind = plain.get("lm_model", "transformer_lm")
    if kind != "transformer_lm":
        raise WeightsError(f"{origin} is a {shown(kind)}; a MusicGen is a 'transformer_lm'.")
    missing = [name for name in _LM_SECTIONS if not isinstance(plain.get(name), dict)]
    if missing:
        raise WeightsError(f"{origin} holds a configuration without {', '.join(missing)}.")
    for *sections, key in _DROPPED:
        holder = plain["conditioners"]
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(key, None)
    for section in _LM_SECTIONS:
        if text := dangling(plain[section]):
            raise WeightsError(
                f"{origin} holds a configuration that cannot be read: {text!r:.80} in {section} "
                "refers to nothing."
            )
    # One attention module for all: every spelling of it computes the same, this one has the plain names.
    plain["transformer_lm"] |= {"memory_efficient": True, "custom": False}
    plain["transformer_lm"].setdefault("hidden_scale", 4)
    check_lm(plain, origin)
    return OmegaConf.create(inert(plain))


def check_lm(plain: Mapping[str, Any], origin: str) -> None:
    """Whether a complete configuration, its references resolved, is one that can generate.

    Raises:
        WeightsError: a used field is of another kind, out of its range, or does not go with the others.
    """
    top = checked(plain, known.LM, "", origin, others=True)
    duration_s = checked(plain["dataset"], known.DATASET, "dataset", origin, others=True)["segment_duration"]
    lm = checked(plain["transformer_lm"], known.TRANSFORMER_LM, "transformer_lm", origin)
    if lm["dim"] % 2 or lm["dim"] % lm["num_heads"]:
        raise WeightsError(
            f"{origin} has transformer_lm.dim {lm['dim']} and num_heads {lm['num_heads']}; "
            "dim must be even and a multiple of num_heads."
        )
    if int(lm["hidden_scale"] * lm["dim"]) < 1:
        raise WeightsError(
            f"{origin} has transformer_lm.hidden_scale {lm['hidden_scale']}, which leaves no feed-forward "
            "layer."
        )
    _check_pattern(plain["codebooks_pattern"], lm, origin)
    if plain.get("interleave_stereo_codebooks") is not None:
        checked(plain["interleave_stereo_codebooks"], known.STEREO, "interleave_stereo_codebooks", origin)
    names = _check_conditioners(plain["conditioners"], origin)
    _check_fuser(plain["fuser"], names, lm, origin)
    wav = plain["conditioners"].get("self_wav")
    if isinstance(wav, dict) and wav.get("model") == "chroma_stem":
        _check_chroma(wav.get("chroma_stem"), top.get("sample_rate"), duration_s, origin)


def _check_pattern(pattern: Mapping[str, Any], lm: Mapping[str, Any], origin: str) -> None:
    modeling = checked(pattern, known.CODEBOOKS_PATTERN, "codebooks_pattern", origin, others=True)["modeling"]
    if modeling is None:
        if lm.get("q_modeling") is None:
            raise WeightsError(f"{origin} names no codebooks pattern in its configuration.")
        return
    delay = checked(pattern.get("delay", {}), known.DELAY, "codebooks_pattern.delay", origin)
    delays = delay.get("delays")
    if delays is not None and (len(delays) != lm["n_q"] or delays != sorted(delays)):
        raise WeightsError(
            f"{origin} has codebooks_pattern.delay.delays {shown(delays)}; "
            f"it must be one for each of the {lm['n_q']} codebooks, in ascending order."
        )


def _check_conditioners(conditioners: Mapping[str, Any], origin: str) -> set[str]:
    """The conditioners' names."""
    names = {str(name) for name in conditioners if name != "args"}
    for name in sorted(names):
        own = conditioners.get(name)
        if not isinstance(own, dict):
            raise WeightsError(f"{origin} has conditioners.{name:.60} {shown(own)}; it must be a mapping.")
        if isinstance(own.get("t5"), dict):
            component_name(own["t5"].get("name"))
        if own.get("model") == "t5":
            checked(own.get("t5"), known.T5_CONDITIONER, f"conditioners.{name:.60}.t5", origin, others=True)
    return names


def _check_fuser(fuser: Mapping[str, Any], names: set[str], lm: Mapping[str, Any], origin: str) -> None:
    how = checked(fuser, known.FUSER, "fuser", origin)
    fused = [name for way in ("sum", "prepend", "cross", "input_interpolate") for name in how[way]]
    if sorted(fused) != sorted(names):
        raise WeightsError(
            f"{origin} has a fuser for {', '.join(fused)[:80] or 'nothing'}; it must name each of the "
            f"conditioners once: {', '.join(sorted(names))[:80]}."
        )
    if lm.get("cross_attention") and not how["cross"]:
        raise WeightsError(
            f"{origin} has transformer_lm.cross_attention true and nothing in fuser.cross to attend to."
        )


def _check_chroma(chroma: object, rate_hz: int | None, duration_s: float, origin: str) -> None:
    where = "conditioners.self_wav.chroma_stem"
    own = checked(chroma, known.CHROMA, where, origin, others=True)
    if rate_hz is None:
        raise WeightsError(f"{origin} has no sample_rate; a model that follows a melody must have one.")
    window = own.get("winlen") or 2 ** own["radix2_exp"]
    size, hop = own.get("nfft") or window, own.get("winhop") or window // 4
    if not window // 16 <= hop <= window <= size:
        raise WeightsError(
            f"{origin} has {where} with winhop {hop}, winlen {window} and nfft {size}; winhop must be "
            "1/16 of winlen up to winlen, and winlen at most nfft."
        )
    frames = 1 + int(rate_hz * duration_s) // hop
    if frames > _MAX_CHROMA_FRAMES:
        raise WeightsError(
            f"{origin} has {frames} frames of chroma in {duration_s} s; at most {_MAX_CHROMA_FRAMES} are "
            "accepted."
        )
