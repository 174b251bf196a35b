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

FLAG = Field(Flag())
UNUSED = Field(Ignored())
_NAMES = Field(Items(Text(100), 0, 8), required=True)
RATE_HZ = Whole(1_000, 192_000)
CHANNELS = Whole(1, 2)
KERNEL = Field(Whole(1, 64))
PAD_MODE = Field(OneOf("constant", "reflect", "replicate", "circular"))
RATIOS = Items(Whole(1, 64), 1, 8)
_SHARE = Field(Real(0, 1))

MAX_TENSOR_WIDTH = 32_768
"""Channels of the widest layer of a codec, which doubles its filters at every ratio."""
MAX_DILATION = 4096
MAX_FRAMES_PER_S = 200

# --- the language model --------------------------------------------------------------------------

LM: Table = {
    "sample_rate": Field(optional(RATE_HZ)),
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
    "norm_first": FLAG,
    "bias_ff": FLAG,
    "bias_attn": FLAG,
    "bias_proj": FLAG,
    "past_context": Field(optional(Whole(0, 10**9))),
    "causal": FLAG,
    "custom": FLAG,
    "memory_efficient": FLAG,
    "attention_as_float32": FLAG,
    "layer_scale": Field(optional(Real(0, 1e6))),
    "positional_embedding": Field(OneOf("sin")),
    "max_period": Field(Real(1, 1e9, above=True)),
    "positional_scale": Field(Real(-1e6, 1e6)),
    "xpos": FLAG,
    "cross_attention": FLAG,
    "qk_layer_norm": FLAG,
    "qk_layer_norm_cross": FLAG,
    "kv_repeat": Field(Whole(1, 512)),
    "q_modeling": Field(optional(OneOf("delay"))),
    "layer_norm_eps": Field(Real(0, 1, above=True)),
    **dict.fromkeys(
        ("dropout", "emb_lr", "lr", "weight_decay", "checkpointing", "weight_init", "depthwise_init",
         "zero_bias_init", "attention_dropout", "two_step_cfg"),
        UNUSED,
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
    "cross_attention_pos_emb": FLAG,
    "cross_attention_pos_emb_scale": Field(Real(-1e6, 1e6)),
}
STEREO: Table = {"use": Field(Flag(), required=True), "per_timestep": FLAG}
T5_CONDITIONER: Table = {"name": Field(Text(200), required=True), "normalize_text": Field(optional(Flag()))}
CHROMA: Table = {
    "n_chroma": Field(Whole(1, 128), required=True),
    "radix2_exp": Field(Whole(4, 16), required=True),
    "nfft": Field(optional(Whole(16, 65_536))),
    "winlen": Field(optional(Whole(16, 65_536))),
    "winhop": Field(optional(Whole(1, 65_536))),
    "argmax": FLAG,
    "norm": Field(Real(0, float("inf"))),
}

# --- the codec -----------------------------------------------------------------------------------

CODEC: Table = {"compression_model": Field(OneOf("encodec"), required=True)}
ENCODEC: Table = {
    "autoencoder": Field(OneOf("seanet"), required=True),
    "quantizer": Field(OneOf("rvq"), required=True),
    "sample_rate": Field(RATE_HZ, required=True),
    "channels": Field(CHANNELS, required=True),
    "causal": FLAG,
    "renormalize": FLAG,
    "renorm": UNUSED,
}
_SCALARS = Field(Entries(Either(Flag(), Real(-1024, 1024)), 4))
SEANET: Table = {
    "channels": Field(CHANNELS),
    "dimension": Field(Whole(1, 4096)),
    "n_filters": Field(Whole(1, 4096)),
    "n_residual_layers": Field(Whole(0, 12)),
    "ratios": Field(RATIOS),
    "activation": Field(OneOf("ELU", "ReLU", "LeakyReLU", "GELU", "SiLU", "Tanh")),
    "activation_params": _SCALARS,
    "norm": Field(OneOf("none", "weight_norm", "spectral_norm", "time_group_norm")),
    "norm_params": _SCALARS,
    "kernel_size": KERNEL,
    "last_kernel_size": KERNEL,
    "residual_kernel_size": KERNEL,
    "dilation_base": Field(Whole(1, 16)),
    "causal": FLAG,
    "pad_mode": PAD_MODE,
    "true_skip": FLAG,
    "compress": Field(Whole(1, 4096)),
    "lstm": Field(Whole(0, 16)),
    "disable_norm_outer_blocks": Field(Whole(0, 10)),
}
SEANET_DECODER: Table = {
    **SEANET,
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
        UNUSED,
    ),
}  # fmt: skip
