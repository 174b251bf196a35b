"""The tables of transformers' EnCodec, T5, Demucs and MultiBand Diffusion; see `field_tables.py`."""

from musicgen_svc.checkpoints.field_tables import (
    BOOLEAN,
    CHANNELS,
    IGNORED,
    KERNEL,
    PAD_MODE,
    RATE_HZ,
    RATIOS,
)
from musicgen_svc.checkpoints.field_types import (
    AnyOf,
    Boolean,
    Field,
    Integer,
    ListOf,
    MapOf,
    Null,
    Number,
    OneOf,
    Table,
    Text,
    optional,
)

TRANSFORMERS_ENCODEC: Table = {
    "target_bandwidths": Field(
        ListOf(Number(0, 10_000, exclusive=True), 1, 16), default=[1.5, 3.0, 6.0, 12.0, 24.0]
    ),
    "sampling_rate": Field(RATE_HZ, default=24_000),
    "audio_channels": Field(CHANNELS),
    "normalize": BOOLEAN,
    "chunk_length_s": Field(optional(Number(0, 3600, exclusive=True))),
    "overlap": Field(optional(Number(0, 0.99))),
    "hidden_size": Field(Integer(1, 4096), default=128),
    "num_filters": Field(Integer(1, 4096), default=32),
    "num_residual_layers": Field(Integer(0, 12), default=1),
    "upsampling_ratios": Field(RATIOS, default=[8, 5, 4, 2]),
    "norm_type": Field(OneOf("weight_norm", "time_group_norm")),
    "kernel_size": KERNEL,
    "last_kernel_size": KERNEL,
    "residual_kernel_size": KERNEL,
    "dilation_growth_rate": Field(Integer(1, 16), default=2),
    "use_causal_conv": BOOLEAN,
    "pad_mode": PAD_MODE,
    "compress": Field(Integer(1, 4096), default=2),
    "num_lstm_layers": Field(Integer(0, 16)),
    "trim_right_ratio": Field(Number(0, 1)),
    "codebook_size": Field(Integer(2, 65_536), default=1024),
    "codebook_dim": Field(optional(Integer(1, 4096))),
    "use_conv_shortcut": BOOLEAN,
}

# --- the text encoder ----------------------------------------------------------------------------

T5: Table = {
    "vocab_size": Field(Integer(1, 1_000_000), default=32128),
    "d_model": Field(Integer(1, 16_384), default=512),
    "d_kv": Field(Integer(1, 1024), default=64),
    "d_ff": Field(Integer(1, 131_072), default=2048),
    "num_layers": Field(Integer(1, 128), default=6),
    "num_heads": Field(Integer(1, 256), default=8),
    "relative_attention_num_buckets": Field(Integer(4, 4096), default=32),
    "relative_attention_max_distance": Field(Integer(2, 1_000_000), default=128),
    "layer_norm_epsilon": Field(Number(0, 1, exclusive=True), default=1e-6),
    "feed_forward_proj": Field(OneOf("relu", "gated-gelu"), default="relu"),
}
"""The defaults are those of transformers, which leaves fields with default values out of its files."""

_TOKEN = AnyOf(Text(200), MapOf(AnyOf(Boolean(), Text(200)), 12), Null())
TOKENIZER: Table = {
    "extra_ids": Field(Integer(0, 10_000)),
    "model_max_length": Field(optional(Number(1, 1e31))),
    "additional_special_tokens": Field(optional(ListOf(_TOKEN, 0, 10_000))),
    "extra_special_tokens": Field(AnyOf(ListOf(_TOKEN, 0, 10_000), MapOf(_TOKEN, 10_000), Null())),
    "added_tokens_decoder": Field(MapOf(_TOKEN, 20_000)),
    **dict.fromkeys(("eos_token", "unk_token", "pad_token"), Field(_TOKEN)),
}
"""Fields of `tokenizer_config.json`."""

# --- Demucs and MultiBand Diffusion --------------------------------------------------------------

DEMUCS_BAG: Table = {
    "models": Field(ListOf(Text(200), 1, 8), required=True),
    "weights": Field(optional(ListOf(ListOf(Number(-1e6, 1e6), 1, 16), 1, 8))),
    "segment": Field(optional(Number(0.1, 600))),
}
_WIDTH = Field(Integer(1, 512))
DEMUCS: Table = {
    "sources": Field(ListOf(Text(100), 1, 16), required=True),
    "audio_channels": Field(CHANNELS),
    "channels": _WIDTH,
    "channels_time": Field(optional(Integer(1, 512))),
    "growth": Field(Number(0, 4, exclusive=True)),
    "depth": Field(Integer(1, 10)),
    "lstm_layers": Field(Integer(0, 8)),
    "nfft": Field(Integer(64, 16_384)),
    "wiener_iters": Field(Integer(0, 10)),
    "end_iters": Field(Integer(0, 10)),
    "multi_freqs": Field(optional(ListOf(Number(0, 1), 0, 8))),
    "multi_freqs_depth": Field(Integer(0, 10)),
    "kernel_size": KERNEL,
    "stride": KERNEL,
    "time_stride": KERNEL,
    "context": Field(Integer(0, 16)),
    "context_enc": Field(Integer(0, 16)),
    "dconv_depth": Field(Integer(0, 8)),
    "dconv_comp": Field(Number(1, 512)),
    "dconv_attn": Field(Integer(0, 100)),
    "dconv_lstm": Field(Integer(0, 100)),
    "bottom_channels": Field(Integer(0, 4096)),
    "t_layers": Field(Integer(0, 64)),
    "t_hidden_scale": Field(Number(0, 16, exclusive=True)),
    "t_heads": Field(Integer(1, 128)),
    "t_max_positions": Field(Integer(1, 100_000)),
    "samplerate": Field(RATE_HZ),
    "segment": Field(Number(0.5, 120)),  # seconds
}
"""Arguments of the three Demucs classes. Any other argument must be a `DEMUCS_OTHER`."""
DEMUCS_OTHER = AnyOf(Boolean(), Number(-1e6, 1e6), Text(100), ListOf(Number(-1e6, 1e6), 0, 16), Null())
MAX_DEMUCS_WIDTH = 8192

DIFFUSION: Table = {
    "sample_rate": Field(RATE_HZ, required=True),
    "n_bands": Field(Integer(1, 16), required=True),
}
BAND: Table = {"channels": Field(Integer(1, 1), default=1)}
DIFFUSION_UNET: Table = {
    "hidden": Field(Integer(1, 4096)),
    "depth": Field(Integer(1, 12)),
    "growth": Field(Number(0, 8, exclusive=True)),
    "max_channels": Field(Integer(1, 16_384)),
    "res_blocks": Field(Integer(0, 10)),
    "norm_groups": Field(Integer(1, 4096)),
    "kernel": KERNEL,
    "stride": KERNEL,
    "dropout": IGNORED,
    "emb_all_layers": BOOLEAN,
    "bilstm": BOOLEAN,
    "codec_dim": Field(Integer(1, 4096), required=True),
    "transformer": BOOLEAN,
    "cross_attention": BOOLEAN,
}
DIFFUSION_SCHEDULE: Table = {
    "repartition": Field(OneOf("power")),
    "beta_t0": Field(Number(0, 0.999, exclusive=True)),
    "beta_t1": Field(Number(0, 0.999, exclusive=True)),
    "beta_exp": Field(Number(0.01, 100)),
    "num_steps": Field(Integer(2, 10_000), required=True),
    "variance": Field(OneOf("beta", "beta_tilde")),
    "clip": Field(Number(0, 1e6, exclusive=True)),
    "rescale": Field(Number(0, 1e6, exclusive=True)),
    "n_bands": Field(Null()),
    "noise_scale": Field(Number(0, 1e6)),
}
DIFFUSION_PROCESSOR: Table = {
    "use": Field(Boolean(), required=True),
    "name": Field(OneOf("multi_band_processor")),
    "n_bands": Field(Integer(1, 64)),
    "num_samples": Field(Integer(0, 10**9)),
    "power_std": Field(AnyOf(Number(-10, 10), ListOf(Number(-10, 10), 1, 64))),
}
