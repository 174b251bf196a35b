"""As `known_fields.py`, for what stands beside a language model and its codec of audiocraft's."""

from musicgen_svc.checkpoints.fields import (
    Either,
    Entries,
    Field,
    Flag,
    Items,
    Nothing,
    OneOf,
    Real,
    Table,
    Text,
    Whole,
    optional,
)
from musicgen_svc.checkpoints.known_fields import CHANNELS, FLAG, KERNEL, PAD_MODE, RATE_HZ, RATIOS, UNUSED

TRANSFORMERS_ENCODEC: Table = {
    "target_bandwidths": Field(
        Items(Real(0, 10_000, above=True), 1, 16), default=[1.5, 3.0, 6.0, 12.0, 24.0]
    ),
    "sampling_rate": Field(RATE_HZ, default=24_000),
    "audio_channels": Field(CHANNELS),
    "normalize": FLAG,
    "chunk_length_s": Field(optional(Real(0, 3600, above=True))),
    "overlap": Field(optional(Real(0, 0.99))),
    "hidden_size": Field(Whole(1, 4096), default=128),
    "num_filters": Field(Whole(1, 4096), default=32),
    "num_residual_layers": Field(Whole(0, 12), default=1),
    "upsampling_ratios": Field(RATIOS, default=[8, 5, 4, 2]),
    "norm_type": Field(OneOf("weight_norm", "time_group_norm")),
    "kernel_size": KERNEL,
    "last_kernel_size": KERNEL,
    "residual_kernel_size": KERNEL,
    "dilation_growth_rate": Field(Whole(1, 16), default=2),
    "use_causal_conv": FLAG,
    "pad_mode": PAD_MODE,
    "compress": Field(Whole(1, 4096), default=2),
    "num_lstm_layers": Field(Whole(0, 16)),
    "trim_right_ratio": Field(Real(0, 1)),
    "codebook_size": Field(Whole(2, 65_536), default=1024),
    "codebook_dim": Field(optional(Whole(1, 4096))),
    "use_conv_shortcut": FLAG,
}

# --- the text encoder ----------------------------------------------------------------------------

T5: Table = {
    "vocab_size": Field(Whole(1, 1_000_000), default=32128),
    "d_model": Field(Whole(1, 16_384), default=512),
    "d_kv": Field(Whole(1, 1024), default=64),
    "d_ff": Field(Whole(1, 131_072), default=2048),
    "num_layers": Field(Whole(1, 128), default=6),
    "num_heads": Field(Whole(1, 256), default=8),
    "relative_attention_num_buckets": Field(Whole(4, 4096), default=32),
    "relative_attention_max_distance": Field(Whole(2, 1_000_000), default=128),
    "layer_norm_epsilon": Field(Real(0, 1, above=True), default=1e-6),
    "feed_forward_proj": Field(OneOf("relu", "gated-gelu"), default="relu"),
}
"""The defaults are transformers': what a configuration that leaves the field out means."""

_TOKEN = Either(Text(200), Entries(Either(Flag(), Text(200)), 12), Nothing())
TOKENIZER: Table = {
    "extra_ids": Field(Whole(0, 10_000)),
    "model_max_length": Field(optional(Real(1, 1e31))),
    "additional_special_tokens": Field(optional(Items(_TOKEN, 0, 10_000))),
    "extra_special_tokens": Field(Either(Items(_TOKEN, 0, 10_000), Entries(_TOKEN, 10_000), Nothing())),
    "added_tokens_decoder": Field(Entries(_TOKEN, 20_000)),
    **dict.fromkeys(("eos_token", "unk_token", "pad_token"), Field(_TOKEN)),
}
"""Of `tokenizer_config.json`."""

# --- Demucs and MultiBand Diffusion --------------------------------------------------------------

DEMUCS_BAG: Table = {
    "models": Field(Items(Text(200), 1, 8), required=True),
    "weights": Field(optional(Items(Items(Real(-1e6, 1e6), 1, 16), 1, 8))),
    "segment": Field(optional(Real(0.1, 600))),
}
_WIDTH = Field(Whole(1, 512))
DEMUCS: Table = {
    "sources": Field(Items(Text(100), 1, 16), required=True),
    "audio_channels": Field(CHANNELS),
    "channels": _WIDTH,
    "channels_time": Field(optional(Whole(1, 512))),
    "growth": Field(Real(0, 4, above=True)),
    "depth": Field(Whole(1, 10)),
    "lstm_layers": Field(Whole(0, 8)),
    "nfft": Field(Whole(64, 16_384)),
    "wiener_iters": Field(Whole(0, 10)),
    "end_iters": Field(Whole(0, 10)),
    "multi_freqs": Field(optional(Items(Real(0, 1), 0, 8))),
    "multi_freqs_depth": Field(Whole(0, 10)),
    "kernel_size": KERNEL,
    "stride": KERNEL,
    "time_stride": KERNEL,
    "context": Field(Whole(0, 16)),
    "context_enc": Field(Whole(0, 16)),
    "dconv_depth": Field(Whole(0, 8)),
    "dconv_comp": Field(Real(1, 512)),
    "dconv_attn": Field(Whole(0, 100)),
    "dconv_lstm": Field(Whole(0, 100)),
    "bottom_channels": Field(Whole(0, 4096)),
    "t_layers": Field(Whole(0, 64)),
    "t_hidden_scale": Field(Real(0, 16, above=True)),
    "t_heads": Field(Whole(1, 128)),
    "t_max_positions": Field(Whole(1, 100_000)),
    "samplerate": Field(RATE_HZ),
    "segment": Field(Real(0.5, 120)),  # seconds
}
"""Arguments of the three classes; any other is at most `DEMUCS_OTHER`."""
DEMUCS_OTHER = Either(Flag(), Real(-1e6, 1e6), Text(100), Items(Real(-1e6, 1e6), 0, 16), Nothing())
MAX_DEMUCS_WIDTH = 8192

DIFFUSION: Table = {
    "sample_rate": Field(RATE_HZ, required=True),
    "n_bands": Field(Whole(1, 16), required=True),
}
BAND: Table = {"channels": Field(Whole(1, 1), default=1)}
DIFFUSION_UNET: Table = {
    "hidden": Field(Whole(1, 4096)),
    "depth": Field(Whole(1, 12)),
    "growth": Field(Real(0, 8, above=True)),
    "max_channels": Field(Whole(1, 16_384)),
    "res_blocks": Field(Whole(0, 10)),
    "norm_groups": Field(Whole(1, 4096)),
    "kernel": KERNEL,
    "stride": KERNEL,
    "dropout": UNUSED,
    "emb_all_layers": FLAG,
    "bilstm": FLAG,
    "codec_dim": Field(Whole(1, 4096), required=True),
    "transformer": FLAG,
    "cross_attention": FLAG,
}
DIFFUSION_SCHEDULE: Table = {
    "repartition": Field(OneOf("power")),
    "beta_t0": Field(Real(0, 0.999, above=True)),
    "beta_t1": Field(Real(0, 0.999, above=True)),
    "beta_exp": Field(Real(0.01, 100)),
    "num_steps": Field(Whole(2, 10_000), required=True),
    "variance": Field(OneOf("beta", "beta_tilde")),
    "clip": Field(Real(0, 1e6, above=True)),
    "rescale": Field(Real(0, 1e6, above=True)),
    "n_bands": Field(Nothing()),
    "noise_scale": Field(Real(0, 1e6)),
}
DIFFUSION_PROCESSOR: Table = {
    "use": Field(Flag(), required=True),
    "name": Field(OneOf("multi_band_processor")),
    "n_bands": Field(Whole(1, 64)),
    "num_samples": Field(Whole(0, 10**9)),
    "power_std": Field(Either(Real(-10, 10), Items(Real(-10, 10), 1, 64))),
}
