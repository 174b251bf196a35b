"""Every field of a configuration that is used, its kind and its range: one table for each section.

The ranges are generous: each holds the released models' values several times over (a `large` has 48 layers
of width 2048; 512 layers of width 16,384 are accepted), and each is small enough that what is built from the
largest values takes seconds, and megabytes on top of the tensors. Where tensors tell a number, `agreement.py`
compares it with them as well.

| what | released | accepted |
|---|---|---|
| layers, width, heads of the language model | 48, 2048, 32 | 512, 16,384, 512 |
| codebooks, entries of one | 8, 2048 | 64, 65,536 |
| window | 30 s | up to 120 s |
| codec: rate, channels of a layer | 32 kHz, 1024 | 192 kHz, 32,768 |
| T5: layers, width, vocabulary | 24, 1024, 32,128 | 128, 16,384, 1,000,000 |
| chroma: classes, window | 12, 16,384 samples | 128, 65,536 samples |
| MultiBand Diffusion: bands, depth, steps | 4, 4, 1000 | 16, 12, 10,000 |
| Demucs: models, channels, depth | 4, 64, 6 | 8, 512, 10 |
"""

from musicgen_svc.checkpoints.fields import (
    Either,
    Entries,
    Field,
    Flag,
    Ignored,
    Items,
    Nothing,
    OneOf,
    Real,
    Table,
    Text,
    Whole,
    optional,
)

_FLAG = Field(Flag())
_UNUSED = Field(Ignored())
_NAMES = Field(Items(Text(100), 0, 8), required=True)
_RATE_HZ = Whole(1_000, 192_000)
_CHANNELS = Whole(1, 2)
_KERNEL = Field(Whole(1, 64))
_PAD_MODE = Field(OneOf("constant", "reflect", "replicate", "circular"))
_RATIOS = Items(Whole(1, 64), 1, 8)
_SHARE = Field(Real(0, 1))

MAX_TENSOR_WIDTH = 32_768
"""Channels of the widest layer of a codec, which doubles its filters at every ratio."""
MAX_DILATION = 4096
MAX_FRAMES_PER_S = 200

# --- the language model --------------------------------------------------------------------------

LM: Table = {
    "sample_rate": Field(optional(_RATE_HZ)),
    "compression_model_checkpoint": Field(optional(Text())),
    "compression_model_n_q": Field(optional(Whole(1, 64))),
}
"""The top level."""

DATASET: Table = {"segment_duration": Field(Real(0, 120, above=True), required=True)}  # seconds

TRANSFORMER_LM: Table = {
    "dim": Field(Whole(4, 16_384), required=True),
    "num_heads": Field(Whole(1, 512), required=True),
    "num_layers": Field(Whole(1, 512), required=True),
    "n_q": Field(Whole(1, 64), required=True),
    "card": Field(Whole(2, 65_536), required=True),
    "hidden_scale": Field(Real(0, 64, above=True), default=4),
    "activation": Field(OneOf("gelu", "relu")),
    "norm": Field(OneOf("layer_norm")),
    "norm_first": _FLAG,
    "bias_ff": _FLAG,
    "bias_attn": _FLAG,
    "bias_proj": _FLAG,
    "past_context": Field(optional(Whole(0, 10**9))),
    "causal": _FLAG,
    "custom": _FLAG,
    "memory_efficient": _FLAG,
    "attention_as_float32": _FLAG,
    "layer_scale": Field(optional(Real(0, 1e6))),
    "positional_embedding": Field(OneOf("sin", "rope", "sin_rope")),
    "max_period": Field(Real(1, 1e9, above=True)),
    "positional_scale": Field(Real(-1e6, 1e6)),
    "xpos": _FLAG,
    "cross_attention": _FLAG,
    "qk_layer_norm": _FLAG,
    "qk_layer_norm_cross": _FLAG,
    "kv_repeat": Field(Whole(1, 512)),
    "q_modeling": Field(optional(OneOf("delay"))),
    "layer_norm_eps": Field(Real(0, 1, above=True)),
    **dict.fromkeys(
        ("dropout", "emb_lr", "lr", "weight_decay", "checkpointing", "weight_init", "depthwise_init",
         "zero_bias_init", "attention_dropout", "two_step_cfg"),
        _UNUSED,
    ),
}  # fmt: skip

CODEBOOKS_PATTERN: Table = {"modeling": Field(optional(OneOf("delay")), required=True)}
DELAY: Table = {
    "delays": Field(optional(Items(Whole(0, 256), 1, 64))),
    "flatten_first": Field(Whole(0, 256)),
    "empty_initial": Field(Whole(-1, 256)),
}
FUSER: Table = {
    "sum": _NAMES,
    "prepend": _NAMES,
    "cross": _NAMES,
    "input_interpolate": _NAMES,
    "cross_attention_pos_emb": _FLAG,
    "cross_attention_pos_emb_scale": Field(Real(-1e6, 1e6)),
}
STEREO: Table = {"use": Field(Flag(), required=True), "per_timestep": _FLAG}
T5_CONDITIONER: Table = {"name": Field(Text(200), required=True), "normalize_text": Field(optional(Flag()))}
CHROMA: Table = {
    "n_chroma": Field(Whole(1, 128), required=True),
    "radix2_exp": Field(Whole(4, 16), required=True),
    "nfft": Field(optional(Whole(16, 65_536))),
    "winlen": Field(optional(Whole(16, 65_536))),
    "winhop": Field(optional(Whole(1, 65_536))),
    "argmax": _FLAG,
    "norm": Field(Real(0, float("inf"))),
}

# --- the codec -----------------------------------------------------------------------------------

CODEC: Table = {"compression_model": Field(OneOf("encodec"), required=True)}
ENCODEC: Table = {
    "autoencoder": Field(OneOf("seanet"), required=True),
    "quantizer": Field(OneOf("rvq"), required=True),
    "sample_rate": Field(_RATE_HZ, required=True),
    "channels": Field(_CHANNELS, required=True),
    "causal": _FLAG,
    "renormalize": _FLAG,
    "renorm": _UNUSED,
}
_SCALARS = Field(Entries(Either(Flag(), Real(-1024, 1024)), 4))
SEANET: Table = {
    "channels": Field(_CHANNELS),
    "dimension": Field(Whole(1, 4096)),
    "n_filters": Field(Whole(1, 4096)),
    "n_residual_layers": Field(Whole(0, 12)),
    "ratios": Field(_RATIOS),
    "activation": Field(OneOf("ELU", "ReLU", "LeakyReLU", "GELU", "SiLU", "Tanh")),
    "activation_params": _SCALARS,
    "norm": Field(OneOf("none", "weight_norm", "spectral_norm", "time_group_norm")),
    "norm_params": _SCALARS,
    "kernel_size": _KERNEL,
    "last_kernel_size": _KERNEL,
    "residual_kernel_size": _KERNEL,
    "dilation_base": Field(Whole(1, 16)),
    "causal": _FLAG,
    "pad_mode": _PAD_MODE,
    "true_skip": _FLAG,
    "compress": Field(Whole(1, 4096)),
    "lstm": Field(Whole(0, 16)),
    "disable_norm_outer_blocks": Field(Whole(0, 10)),
}
SEANET_DECODER: Table = SEANET | {
    "final_activation": Field(optional(OneOf("ELU", "ReLU", "LeakyReLU", "GELU", "SiLU", "Tanh"))),
    "final_activation_params": Field(Either(_SCALARS.kind, Nothing())),
    "trim_right_ratio": _SHARE,
}
RVQ: Table = {
    "n_q": Field(Whole(1, 64)),
    "bins": Field(Whole(2, 65_536)),
    **dict.fromkeys(
        ("q_dropout", "decay", "kmeans_init", "kmeans_iters", "threshold_ema_dead_code",
         "orthogonal_reg_weight", "orthogonal_reg_active_codes_only", "orthogonal_reg_max_codes"),
        _UNUSED,
    ),
}  # fmt: skip

TRANSFORMERS_ENCODEC: Table = {
    "target_bandwidths": Field(
        Items(Real(0, 10_000, above=True), 1, 16), default=[1.5, 3.0, 6.0, 12.0, 24.0]
    ),
    "sampling_rate": Field(_RATE_HZ, default=24_000),
    "audio_channels": Field(_CHANNELS),
    "normalize": _FLAG,
    "chunk_length_s": Field(optional(Real(0, 3600, above=True))),
    "overlap": Field(optional(Real(0, 0.99))),
    "hidden_size": Field(Whole(1, 4096), default=128),
    "num_filters": Field(Whole(1, 4096), default=32),
    "num_residual_layers": Field(Whole(0, 12), default=1),
    "upsampling_ratios": Field(_RATIOS, default=[8, 5, 4, 2]),
    "norm_type": Field(OneOf("weight_norm", "time_group_norm")),
    "kernel_size": _KERNEL,
    "last_kernel_size": _KERNEL,
    "residual_kernel_size": _KERNEL,
    "dilation_growth_rate": Field(Whole(1, 16), default=2),
    "use_causal_conv": _FLAG,
    "pad_mode": _PAD_MODE,
    "compress": Field(Whole(1, 4096), default=2),
    "num_lstm_layers": Field(Whole(0, 16)),
    "trim_right_ratio": Field(Real(0, 1)),
    "codebook_size": Field(Whole(2, 65_536), default=1024),
    "codebook_dim": Field(optional(Whole(1, 4096))),
    "use_conv_shortcut": _FLAG,
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
DIFFUSION: Table = {
    "sample_rate": Field(_RATE_HZ, required=True),
    "n_bands": Field(Whole(1, 16), required=True),
}
DIFFUSION_UNET: Table = {
    "hidden": Field(Whole(1, 4096)),
    "depth": Field(Whole(1, 12)),
    "growth": Field(Real(0, 8, above=True)),
    "max_channels": Field(Whole(1, 16_384)),
    "res_blocks": Field(Whole(0, 10)),
    "norm_groups": Field(Whole(1, 4096)),
    "kernel": _KERNEL,
    "stride": _KERNEL,
    "dropout": _UNUSED,
    "emb_all_layers": _FLAG,
    "bilstm": _FLAG,
    "codec_dim": Field(Whole(1, 4096), required=True),
    "transformer": _FLAG,
    "cross_attention": _FLAG,
}
DIFFUSION_SCHEDULE: Table = {
    "repartition": Field(OneOf("power")),
    "beta_t0": Field(Real(0, 1, above=True)),
    "beta_t1": Field(Real(0, 1, above=True)),
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
    "n_bands": Field(Whole(2, 64)),
    "num_samples": Field(Whole(0, 10**9)),
    "power_std": Field(Either(Real(-10, 10), Items(Real(-10, 10), 2, 64))),
}
