"""transformers' MusicGen with the weights of audiocraft's language model, as its users run it.

The model is in fp32 on a CPU and in fp16 on a GPU, with its own attention and its growing cache. Only
decoding is measured: the text is already encoded and projected, and tokens are returned instead of audio.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.random_models import Conditions
from musicgen_svc.audiocraft_compat import LMModel
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.models.meta_init import on_meta
from musicgen_svc.runtime.randomness import GlobalRandom


class TransformersMusicgen:
    """Decodes with transformers. Mono text models only, because transformers has another class for melody."""

    def __init__(self, lm: LMModel) -> None:
        assert lm.transformer.layers[0].cross_attention is not None, "not a text model"
        device = lm.emb[0].weight.device
        dtype = lm.transformer.layers[0].linear1.weight.dtype
        with on_meta():
            model = MusicgenForConditionalGeneration(_config(lm))
        parts = model.decoder.model.decoder
        state = {name: tensor.to(dtype) for name, tensor in _decoder_state(lm).items()}
        model.decoder.load_state_dict(state, strict=True, assign=True)
        table = parts.embed_positions.get_embedding(parts.max_target_positions, lm.dim)
        parts.embed_positions.weights = table.to(device, dtype)  # a constant, in no state
        model.text_encoder = _NoEncoder(model.text_encoder.config)
        model.audio_encoder = _NoDecoder(model.audio_encoder.config)
        self._model, self._delay = model.eval(), max(lm.pattern_provider.delays)
        self._device, self._dtype = device, dtype

    def generate(self, given: Conditions, *, length: int, sampling: SamplingParams, seed: int) -> Tensor:
        """Generates [K, length] tokens, drawn from torch's global generator."""
        assert sampling.guidance > 1 and not sampling.top_p, "one row, or another draw, than audiocraft's"
        text, _ = given["description"]  # the null text is the second row
        rows, words, _ = text.shape
        with GlobalRandom(seed, self._device).pinned():
            codes: Tensor = self._model.generate(
                inputs=torch.ones(1, words, dtype=torch.long, device=self._device),
                encoder_outputs=BaseModelOutput(text.to(self._device, self._dtype)),
                attention_mask=torch.tensor([[1], [0]], device=self._device).expand(rows, words),
                guidance_scale=sampling.guidance,
                do_sample=sampling.temperature > 0,
                temperature=sampling.temperature or None,
                top_k=sampling.top_k if sampling.temperature > 0 else None,
                max_length=length + self._delay + 1,
            )
        assert codes.shape[-1] == length, (codes.shape, length)
        return codes[0, 0]


class _NoEncoder(torch.nn.Module):
    """Replaces T5, because the encoded text is given."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class _NoDecoder(_NoEncoder):
    """Replaces EnCodec, and returns the tokens that it is asked to decode: [1, B, K, T]."""

    def decode(self, codes: Tensor, **_: object) -> Any:
        return type("Decoded", (), {"audio_values": codes})


def _config(lm: LMModel) -> MusicgenConfig:
    """The configuration in transformers' names."""
    layer = lm.transformer.layers[0]
    return MusicgenConfig(
        # As wide as the decoder, so that it does not project the text again at every step.
        text_encoder=T5Config(d_model=lm.dim, num_layers=1, num_heads=1, d_kv=8, d_ff=8, vocab_size=8),
        audio_encoder=EncodecConfig(num_filters=4),
        decoder=MusicgenDecoderConfig(
            vocab_size=lm.card,
            num_hidden_layers=len(lm.transformer.layers),
            ffn_dim=layer.linear1.out_features,
            num_attention_heads=layer.self_attn.num_heads,
            hidden_size=lm.dim,
            num_codebooks=lm.n_q,
            pad_token_id=lm.special_token_id,
            bos_token_id=lm.special_token_id,
        ),
    )


def _decoder_state(lm: LMModel) -> dict[str, Tensor]:
    """audiocraft's weights under transformers' names. Each packed projection becomes three views."""
    state = {}
    inside = "model.decoder."
    for k in range(lm.n_q):
        state[f"{inside}embed_tokens.{k}.weight"] = lm.emb[k].weight
        state[f"lm_heads.{k}.weight"] = lm.linears[k].weight
    norms = {f"{inside}layer_norm": lm.out_norm}
    for index, layer in enumerate(lm.transformer.layers):
        name = f"{inside}layers.{index}."
        norms |= {
            f"{name}self_attn_layer_norm": layer.norm1,
            f"{name}encoder_attn_layer_norm": layer.norm_cross,
            f"{name}final_layer_norm": layer.norm2,
        }
        for theirs, ours in (("self_attn", layer.self_attn), ("encoder_attn", layer.cross_attention)):
            query, key, value = ours.in_proj_weight.chunk(3)
            state[f"{name}{theirs}.q_proj.weight"] = query
            state[f"{name}{theirs}.k_proj.weight"] = key
            state[f"{name}{theirs}.v_proj.weight"] = value
            state[f"{name}{theirs}.out_proj.weight"] = ours.out_proj.weight
        state[f"{name}fc1.weight"], state[f"{name}fc2.weight"] = layer.linear1.weight, layer.linear2.weight
    for name, norm in norms.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = norm.weight, norm.bias
    return state
