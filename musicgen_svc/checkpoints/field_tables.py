"""Every field that is used of audiocraft's configurations, its type and its range: a table for each section.

The ranges are generous: each reaches several times beyond the values of the released models (a `large` has 48
layers of width 2048; 512 layers of width 16,384 are accepted). Each is small enough that a module with the
largest values is built in seconds, and takes megabytes in addition to its tensors. A number that tensors
determine as well is compared with them in `tensor_checks.py`.

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

from musicgen_svc.checkpoints.field_types import (
    AnyOf,
    Boolean,
    Field,
    Ignored,
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

BOOLEAN = Field(Boolean())
IGNORED = Field(Ignored())
_NAMES = Field(ListOf(Text(100), 0, 8), required=True)
RATE_HZ = Integer(1_000, 192_000)
CHANNELS = Integer(1, 2)
KERNEL = Field(Integer(1, 64))
PAD_MODE = Field(OneOf("constant", "reflect", "replicate", "circular"))
RATIOS = ListOf(Integer(1, 64), 1, 8)
_FRACTION = Field(Number(0, 1))

MAX_TENSOR_WIDTH = 32_768
"""The most channels of a codec's widest layer. A codec doubles its filters at every ratio."""
MAX_DILATION = 4096
MAX_FRAMES_PER_S = 200

# --- the language model --------------------------------------------------------------------------

LM: Table = {
    "sample_rate": Field(optional(RATE_HZ)),
    "compression_model_checkpoint": Field(optional(Text())),
    "compression_model_n_q": Field(optional(Integer(1, 64))),
}
"""Fields of the top level."""

DATASET: Table = {"segment_duration": Field(Number(0, 120, exclusive=True), required=True)}  # seconds

TRANSFORMER_LM: Table = {
    "dim": Field(Integer(4, 16_384), required=True),
    "num_heads": Field(Integer(1, 512), required=True),
    "num_layers": Field(Integer(1, 512), required=True),
    "n_q": Field(Integer(1, 64), required=True),
    "card": Field(Integer(2, 65_536), required=True),
    "hidden_scale": Field(Number(0, 64, exclusive=True), default=4),
    "activation": Field(OneOf("gelu", "relu")),
    "norm": Field(OneOf("layer_norm")),
    "norm_first": BOOLEAN,
    "bias_ff": BOOLEAN,
    "bias_attn": BOOLEAN,
    "bias_proj": BOOLEAN,
    "past_context": Field(optional(Integer(0, 10**9))),
    "causal": BOOLEAN,
    "custom": BOOLEAN,
    "memory_efficient": BOOLEAN,
    "attention_as_float32": BOOLEAN,
    "layer_scale": Field(optional(Number(0, 1e6))),
    "positional_embedding": Field(OneOf("sin")),
    "max_period": Field(Number(1, 1e9, exclusive=True)),
    "positional_scale": Field(Number(-1e6, 1e6)),
    "xpos": BOOLEAN,
    "cross_attention": BOOLEAN,
    "qk_layer_norm": BOOLEAN,
    "qk_layer_norm_cross": BOOLEAN,
    "kv_repeat": Field(Integer(1, 512)),
    "q_modeling": Field(optional(OneOf("delay"))),
    "layer_norm_eps": Field(Number(0, 1, exclusive=True)),
    **dict.fromkeys(
        ("dropout", "emb_lr", "lr", "weight_decay", "checkpointing", "weight_init", "depthwise_init",
         "zero_bias_init", "attention_dropout", "two_step_cfg"),
        IGNORED,
    ),
}  # fmt: skip

CODEBOOKS_PATTERN: Table = {"modeling": Field(optional(OneOf("delay")), required=True)}
DELAY: Table = {
    "delays": Field(optional(ListOf(Integer(0, 256), 1, 64))),
    "flatten_first": Field(Integer(0, 256)),
    "empty_initial": Field(Integer(-1, 256)),
}
FUSER: Table = {
    "sum": _NAMES,
    "prepend": _NAMES,
    "cross": _NAMES,
    "input_interpolate": _NAMES,
    "cross_attention_pos_emb": BOOLEAN,
    "cross_attention_pos_emb_scale": Field(Number(-1e6, 1e6)),
}
STEREO: Table = {"use": Field(Boolean(), required=True), "per_timestep": BOOLEAN}
T5_CONDITIONER: Table = {
    "name": Field(Text(200), required=True),
    "normalize_text": Field(optional(Boolean())),
}
CHROMA: Table = {
    "n_chroma": Field(Integer(1, 128), required=True),
    "radix2_exp": Field(Integer(4, 16), required=True),
    "nfft": Field(optional(Integer(16, 65_536))),
    "winlen": Field(optional(Integer(16, 65_536))),
    "winhop": Field(optional(Integer(1, 65_536))),
    "argmax": BOOLEAN,
    "norm": Field(Number(0, float("inf"))),
}

# --- the codec -----------------------------------------------------------------------------------

CODEC: Table = {"compression_model": Field(OneOf("encodec"), required=True)}
ENCODEC: Table = {
    "autoencoder": Field(OneOf("seanet"), required=True),
    "quantizer": Field(OneOf("rvq"), required=True),
    "sample_rate": Field(RATE_HZ, required=True),
    "channels": Field(CHANNELS, required=True),
    "causal": BOOLEAN,
    "renormalize": BOOLEAN,
    "renorm": IGNORED,
}
_SCALARS = Field(MapOf(AnyOf(Boolean(), Number(-1024, 1024)), 4))
SEANET: Table = {
    "channels": Field(CHANNELS),
    "dimension": Field(Integer(1, 4096)),
    "n_filters": Field(Integer(1, 4096)),
    "n_residual_layers": Field(Integer(0, 12)),
    "ratios": Field(RATIOS),
    "activation": Field(OneOf("ELU", "ReLU", "LeakyReLU", "GELU", "SiLU", "Tanh")),
    "activation_params": _SCALARS,
    "norm": Field(OneOf("none", "weight_norm", "spectral_norm", "time_group_norm")),
    "norm_params": _SCALARS,
    "kernel_size": KERNEL,
    "last_kernel_size": KERNEL,
    "residual_kernel_size": KERNEL,
    "dilation_base": Field(Integer(1, 16)),
    "causal": BOOLEAN,
    "pad_mode": PAD_MODE,
    "true_skip": BOOLEAN,
    "compress": Field(Integer(1, 4096)),
    "lstm": Field(Integer(0, 16)),
    "disable_norm_outer_blocks": Field(Integer(0, 10)),
}
SEANET_DECODER: Table = {
    **SEANET,
    "final_activation": Field(optional(OneOf("ELU", "ReLU", "LeakyReLU", "GELU", "SiLU", "Tanh"))),
    "final_activation_params": Field(AnyOf(_SCALARS.type, Null())),
    "trim_right_ratio": _FRACTION,
}
RVQ: Table = {
    "n_q": Field(Integer(1, 64)),
    "bins": Field(Integer(2, 65_536)),
    **dict.fromkeys(
        ("q_dropout", "decay", "kmeans_init", "kmeans_iters", "threshold_ema_dead_code",
         "orthogonal_reg_weight", "orthogonal_reg_active_codes_only", "orthogonal_reg_max_codes"),
        IGNORED,
    ),
}  # fmt: skip
