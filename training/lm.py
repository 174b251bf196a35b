"""The demo model's language model: MusicGen's melody architecture in a small size."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from musicgen_svc.audiocraft_compat import LMModel, builders
from training.codec import CONFIG as CODEC
from training.data import CHROMA_FRAMES, CHROMA_HOP, CHROMA_RADIX, WINDOW_S
from training.synth import BEAT_FRAMES, SAMPLE_RATE
from training.text import WIDTH

DIM = 128
CARD = CODEC["rvq"]["bins"]
CODEBOOKS = CODEC["rvq"]["n_q"]

# At frame t the model needs the chroma frame t / 4. Sinusoidal position embeddings of the two rates can be
# compared if a quarter of each frequency is among the frequencies too. There are 64 of them, from 1 to
# 1 / MAX_PERIOD; a quarter of each is the tenth after it if 4 = MAX_PERIOD ** (10 / 63).
QUARTER_OFFSET = 10
MAX_PERIOD = 4 ** ((DIM // 2 - 1) / QUARTER_OFFSET)

CONFIG: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float16",
    "solver": "musicgen",
    "sample_rate": SAMPLE_RATE,
    "channels": 1,
    "compression_model_checkpoint": "//pretrained/facebook/encodec_32khz",
    "lm_model": "transformer_lm",
    "transformer_lm": {
        "dim": DIM,
        "num_heads": 4,
        "num_layers": 6,
        "hidden_scale": 4,
        "n_q": CODEBOOKS,
        "card": CARD,
        "dropout": 0.0,
        "emb_lr": None,
        "activation": "gelu",
        "norm_first": True,
        "bias_ff": False,
        "bias_attn": False,
        "bias_proj": False,
        "past_context": None,
        "causal": True,
        "custom": False,
        "memory_efficient": True,
        "attention_as_float32": False,
        "layer_scale": None,
        "positional_embedding": "sin",
        "max_period": MAX_PERIOD,
        "xpos": False,
        "checkpointing": "none",
        "weight_init": "gaussian",
        "depthwise_init": "current",
        "zero_bias_init": True,
        "norm": "layer_norm",
        "cross_attention": False,
        "qk_layer_norm": False,
        "qk_layer_norm_cross": False,
        "attention_dropout": None,
        "kv_repeat": 1,
        "two_step_cfg": False,
    },
    "codebooks_pattern": {
        "modeling": "delay",
        "delay": {"delays": list(range(CODEBOOKS)), "flatten_first": 0, "empty_initial": 0},
    },
    "classifier_free_guidance": {"training_dropout": 0.1, "inference_coef": 3.0},
    "attribute_dropout": {"args": {"active_on_eval": False}, "text": {}, "wav": {"self_wav": 0.1}},
    "fuser": {
        "cross_attention_pos_emb": False,
        "cross_attention_pos_emb_scale": 1,
        "sum": [],
        "prepend": ["self_wav", "description"],
        "cross": [],
        "input_interpolate": [],
    },
    "conditioners": {
        "self_wav": {
            "model": "chroma_stem",
            "chroma_stem": {
                "sample_rate": "${sample_rate}",
                "n_chroma": 12,
                "radix2_exp": CHROMA_RADIX,
                "winhop": CHROMA_HOP,
                "argmax": True,
                "match_len_on_eval": False,
                "eval_wavs": None,
                "n_eval_wavs": 100,
                "cache_path": None,
            },
        },
        "description": {
            "model": "t5",
            "t5": {"name": "t5-small", "finetune": False, "word_dropout": 0.0, "normalize_text": False},
        },
    },
    "dataset": {"segment_duration": WINDOW_S},
}


class DemoModel(nn.Module):
    """audiocraft's language model with the two projections of its conditions."""

    def __init__(self) -> None:
        """Makes a model with random weights, except for the heads that `_init_attention_heads` sets."""
        super().__init__()
        config = OmegaConf.create(CONFIG | {"device": "cpu", "dtype": "float32", "conditioners": {}})
        self.lm: LMModel = builders.get_lm_model(config)
        self.text = nn.Linear(WIDTH, DIM)
        self.chroma = nn.Linear(12, DIM)
        self._init_attention_heads()

    def forward(self, tokens: Tensor, captions: Tensor, chroma: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts each token from those before it.

        Args:
            tokens: [B, K, T].
            captions: [B, N, 512], states of T5; zero: no caption.
            chroma: [B, S], pitch classes.

        Returns:
            Logits [B, K, T, card], and a mask [B, K, T] of the logits that exist: because of the delays there
            are none for the last frames of the later codebooks.
        """
        has_caption = captions.any(-1, keepdim=True)
        one_hot = F.one_hot(chroma.long(), 12).float()
        conditions = {
            "description": (self.text(captions) * has_caption, has_caption[..., 0].long()),
            "self_wav": (self.chroma(one_hot), torch.ones(chroma.shape)),
        }
        output = self.lm.compute_predictions(tokens, [], conditions)
        return output.logits, output.mask

    @torch.no_grad()
    def _init_attention_heads(self) -> None:
        """Makes the heads of the first two layers attend to certain positions.

        In each of the two layers, one head attends from frame t to chroma frame t / 4. The others attend to
        the frame after the same moment of earlier beats, from which the position in the beat and in the song
        can be told. Gradient descent would need longer to find either than for all the rest.
        """
        prefix = CHROMA_FRAMES + 7  # with a caption of usual length
        for layer, (ahead, beats) in enumerate(((0, (0.5, 1, 2)), (8, (1.5, 3, 4)))):
            self._init_head(layer, 0, prefix - ahead, offset=QUARTER_OFFSET)
            for head, back in enumerate(beats, start=1):
                self._init_head(layer, head, back * BEAT_FRAMES - 1, offset=0)

    def _init_head(self, layer: int, head: int, back: float, offset: int) -> None:
        """Makes a head attend from position p to p - back, or to a quarter of that.

        The embedding of position p has (cos, sin)(w p) for each frequency w. Rotated by the angle w * back it
        is (cos, sin)(w (p - back)), which equals the embedding of position p - back in the same frequency,
        and that of (p - back) / 4 in the frequency 4 w.

        Args:
            layer: of the transformer.
            head: of the layer.
            back: the distance, in positions.
            offset: 0, or `QUARTER_OFFSET` for a quarter of the position.
        """
        width, half = DIM // 4, DIM // 2
        periods = MAX_PERIOD ** (torch.arange(half) / (half - 1))
        weight = self.lm.transformer.layers[layer].self_attn.in_proj_weight  # [3 * DIM, DIM]: Q, K, V
        queries, keys = (weight[at : at + width] for at in (head * width, DIM + head * width))
        queries.zero_(), keys.zero_()
        for row, key in enumerate(torch.linspace(2, 34, width // 2).round().long().tolist()):
            query = key + offset
            angle = back / periods[query]
            cos, sin = 2 * row, 2 * row + 1
            queries[cos, query], queries[cos, half + query] = math.cos(angle), math.sin(angle)
            queries[sin, query], queries[sin, half + query] = -math.sin(angle), math.cos(angle)
            keys[cos, key] = keys[sin, half + key] = 1.0
