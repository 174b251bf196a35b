"""Reads audiocraft's configurations from checkpoints, and checks them before a model is built from them.

The type and range of each single field is in `field_tables.py`. What several fields must satisfy together is
checked here.
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

import musicgen_svc.checkpoints.field_tables as tables
from musicgen_svc.checkpoints.base import part_name
from musicgen_svc.checkpoints.expansion import expand, first_reference, unreadable_config, without_references
from musicgen_svc.checkpoints.field_types import quoted, read_fields
from musicgen_svc.errors import WeightsError

_LM_SECTIONS = (
    "transformer_lm", "codebooks_pattern", "classifier_free_guidance", "fuser", "conditioners", "dataset",
)  # fmt: skip
_TRAINING_ONLY = (
    ("self_wav", "chroma_stem", "cache_path"), ("args", "merge_text_conditions_p"), ("args", "drop_desc_p"),
)  # fmt: skip
"""Fields under `conditioners` that are dropped: the trainer's own paths and augmentations."""
_MAX_CHROMA_FRAMES = 4096  # 235 in the released models


def plain_config(source: Any, origin: str) -> DictConfig:
    """Any configuration as a new DictConfig that accepts new entries, with its references resolved.

    Raises:
        WeightsError: it is not a configuration, or expands beyond the bounds of `expansion.py`.
    """
    return OmegaConf.create(without_references(expand(source, origin)))


def codec_config(source: Any, origin: str) -> DictConfig:
    """A codec's `xp.cfg` as a new DictConfig of the fields that build the codec.

    Raises:
        WeightsError: it is not a configuration, not one of an EnCodec, or out of its bounds.
    """
    plain = expand(source, origin)
    config = read_fields(plain, tables.CODEC, "", origin, skip_unknown=True)
    config["encodec"] = read_fields(plain.get("encodec"), tables.ENCODEC, "encodec", origin)
    config["rvq"] = read_fields(plain.get("rvq"), tables.RVQ, "rvq", origin)
    seanet = plain.get("seanet")
    common = dict(seanet) if isinstance(seanet, dict) else {}
    own = {side: common.pop(side, None) or {} for side in ("encoder", "decoder")}
    config["seanet"] = read_fields(common, tables.SEANET, "seanet", origin)
    for side, table in (("encoder", tables.SEANET), ("decoder", tables.SEANET_DECODER)):
        config["seanet"][side] = read_fields(own[side], table, f"seanet.{side}", origin)
        stack = config["seanet"] | config["seanet"][side]
        check_codec_stack(
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
                f"{origin} has seanet.{name} {quoted(values)} for encoder and decoder; they must be equal."
            )
    channels = sides[0].get("channels", 1), config["encodec"]["channels"]
    if channels[0] != channels[1]:
        raise WeightsError(
            f"{origin} has seanet.channels {channels[0]} and encodec.channels {channels[1]}; "
            "they must be equal."
        )
    return OmegaConf.create(config)


def check_codec_stack(
    origin: str, *, rate_hz: int, ratios: list[int], filters: int, compress: int, dilation: int
) -> None:
    """Checks what the layers of an EnCodec's encoder or decoder must satisfy together.

    Args:
        ratios: by which each block shortens the audio; their product is the samples of a frame.
        filters: channels of the first block; each block doubles them.
        compress: by which a residual layer divides its channels.
        dilation: of the last residual layer of a block.

    Raises:
        WeightsError: a layer is too wide, has no channels or too large a dilation, or the frame rate is out
            of its bounds.
    """
    hop = 1
    for ratio in ratios:
        hop *= ratio
    width = filters * 2 ** len(ratios)
    if width > tables.MAX_TENSOR_WIDTH:
        raise WeightsError(
            f"{origin} has a codec with layers of {width} channels; at most {tables.MAX_TENSOR_WIDTH} "
            "are accepted."
        )
    if dilation > tables.MAX_DILATION:
        raise WeightsError(
            f"{origin} has a codec with a dilation of {dilation}; at most {tables.MAX_DILATION} is accepted."
        )
    if filters // compress < 1:
        raise WeightsError(
            f"{origin} has a codec that compresses {filters} channels by {compress}, which leaves none."
        )
    if not 1 <= rate_hz // hop <= tables.MAX_FRAMES_PER_S:
        raise WeightsError(
            f"{origin} has a codec of {rate_hz} Hz with frames of {hop} samples; "
            f"it must make 1 to {tables.MAX_FRAMES_PER_S} frames a second."
        )


def lm_config(source: Any, origin: str) -> DictConfig:
    """A language model's `xp.cfg` as a new DictConfig that accepts new entries.

    Fields that only training needs are left out.

    Args:
        source: a YAML string, OmegaConf's object or a plain dict.

    Raises:
        WeightsError: it is another model's, incomplete, out of its bounds, or not a configuration.
    """
    plain = expand(source, origin)
    lm_model = plain.get("lm_model", "transformer_lm")
    if lm_model != "transformer_lm":
        raise WeightsError(f"{origin} is a {quoted(lm_model)}; a MusicGen is a 'transformer_lm'.")
    missing = [name for name in _LM_SECTIONS if not isinstance(plain.get(name), dict)]
    if missing:
        raise WeightsError(f"{origin} holds a configuration without {', '.join(missing)}.")
    for *sections, key in _TRAINING_ONLY:
        holder = plain["conditioners"]
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(key, None)
    for section in _LM_SECTIONS:
        if text := first_reference(plain[section]):
            raise unreadable_config(origin, f"{text!r:.80} in {section} refers to nothing")
    # All attention modules of audiocraft compute the same; the tensors of this one have the plain names.
    plain["transformer_lm"] |= {"memory_efficient": True, "custom": False}
    plain["transformer_lm"].setdefault("hidden_scale", 4)
    check_lm(plain, origin)
    return OmegaConf.create(without_references(plain))


def check_lm(plain: Mapping[str, Any], origin: str) -> None:
    """Checks that a complete configuration with resolved references is one of a model that can generate.

    Raises:
        WeightsError: a used field has another type, is out of its range, or contradicts another field.
    """
    top = read_fields(plain, tables.LM, "", origin, skip_unknown=True)
    duration_s = read_fields(plain["dataset"], tables.DATASET, "dataset", origin, skip_unknown=True)[
        "segment_duration"
    ]
    lm = read_fields(plain["transformer_lm"], tables.TRANSFORMER_LM, "transformer_lm", origin)
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
        read_fields(
            plain["interleave_stereo_codebooks"], tables.STEREO, "interleave_stereo_codebooks", origin
        )
    names = _check_conditioners(plain["conditioners"], origin)
    _check_fuser(plain["fuser"], names, lm, origin)
    wav = plain["conditioners"].get("self_wav")
    if isinstance(wav, dict) and wav.get("model") == "chroma_stem":
        _check_chroma(wav.get("chroma_stem"), top.get("sample_rate"), duration_s, origin)


def _check_pattern(pattern: Mapping[str, Any], lm: Mapping[str, Any], origin: str) -> None:
    """Checks the codebooks pattern, which must be delays, one for each codebook."""
    modeling = read_fields(pattern, tables.CODEBOOKS_PATTERN, "codebooks_pattern", origin, skip_unknown=True)[
        "modeling"
    ]
    if modeling is None:
        if lm.get("q_modeling") is None:
            raise WeightsError(f"{origin} names no codebooks pattern in its configuration.")
        return
    delay = read_fields(pattern.get("delay", {}), tables.DELAY, "codebooks_pattern.delay", origin)
    delays = delay.get("delays")
    if delays is not None and (len(delays) != lm["n_q"] or delays != sorted(delays)):
        raise WeightsError(
            f"{origin} has codebooks_pattern.delay.delays {quoted(delays)}; "
            f"it must be one for each of the {lm['n_q']} codebooks, in ascending order."
        )


def _check_conditioners(conditioners: Mapping[str, Any], origin: str) -> set[str]:
    """Checks the conditioners, and returns their names."""
    names = {str(name) for name in conditioners if name != "args"}
    for name in sorted(names):
        own = conditioners.get(name)
        if not isinstance(own, dict):
            raise WeightsError(f"{origin} has conditioners.{name:.60} {quoted(own)}; it must be a mapping.")
        if isinstance(own.get("t5"), dict):
            part_name(own["t5"].get("name"))
        if own.get("model") == "t5":
            read_fields(
                own.get("t5"), tables.T5_CONDITIONER, f"conditioners.{name:.60}.t5", origin, skip_unknown=True
            )
    return names


def _check_fuser(fuser: Mapping[str, Any], names: set[str], lm: Mapping[str, Any], origin: str) -> None:
    """Checks that the fuser uses each of the conditioners `names` once."""
    methods = read_fields(fuser, tables.FUSER, "fuser", origin)
    fused = [name for method in ("sum", "prepend", "cross", "input_interpolate") for name in methods[method]]
    if sorted(fused) != sorted(names):
        raise WeightsError(
            f"{origin} has a fuser for {', '.join(fused)[:80] or 'nothing'}; it must name each of the "
            f"conditioners once: {', '.join(sorted(names))[:80]}."
        )
    if lm.get("cross_attention") and not methods["cross"]:
        raise WeightsError(
            f"{origin} has transformer_lm.cross_attention true and nothing in fuser.cross to attend to."
        )


def _check_chroma(chroma: object, rate_hz: int | None, duration_s: float, origin: str) -> None:
    """Checks the chroma's window, hop and transform, in samples, and its frames in `duration_s`."""
    where = "conditioners.self_wav.chroma_stem"
    own = read_fields(chroma, tables.CHROMA, where, origin, skip_unknown=True)
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
