"""Random MusicGens of transformers, and their logits."""

from typing import Any

import tiny_lms
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

CARD, TEXT_WIDTH, DIM = 64, 24, 128


def model_of(kind: str, channels: int = 1, seed: int = 0, dim: int = DIM) -> Any:
    """A random MusicGen of transformers whose tokens and conditions all matter."""
    melody = kind == "musicgen_melody"
    decoder_class, config_class, model_class = (
        (transformers.MusicgenMelodyDecoderConfig, transformers.MusicgenMelodyConfig,
         transformers.MusicgenMelodyForConditionalGeneration)
        if melody else
        (transformers.MusicgenDecoderConfig, transformers.MusicgenConfig,
         transformers.MusicgenForConditionalGeneration)
    )  # fmt: skip
    torch.manual_seed(seed)
    config = config_class(
        text_encoder=transformers.T5Config(
            vocab_size=40, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        ),
        audio_encoder=transformers.EncodecConfig(
            target_bandwidths=[4 * 50 * 6 / 1000], sampling_rate=32_000, hidden_size=8, num_filters=2,
            num_residual_layers=1, upsampling_ratios=[8, 5, 4, 4], use_causal_conv=False, num_lstm_layers=1,
            codebook_size=CARD, codebook_dim=8, use_conv_shortcut=False, normalize=False,
        ),
        decoder=decoder_class(
            vocab_size=CARD, hidden_size=dim, num_hidden_layers=2, num_attention_heads=2, ffn_dim=4 * dim,
            num_codebooks=4 * channels, audio_channels=channels, dropout=0.0, pad_token_id=CARD,
            bos_token_id=CARD,
        ),
    )  # fmt: skip
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms are all alike when fresh, and could be confused unseen
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3)
    return model


@torch.inference_mode()
def theirs(model: Any) -> torch.Tensor:
    """The logits [2, K, 7, card] of transformers' model."""
    codebooks, melody = model.decoder.config.num_codebooks, hasattr(model, "audio_enc_to_dec_proj")
    tokens, text, *chroma = tiny_lms.inputs(codebooks, CARD, TEXT_WIDTH, melody)
    if melody:
        prefix = torch.cat([model.audio_enc_to_dec_proj(chroma[0]), model.enc_to_dec_proj(text)], 1)
        logits = model(encoder_hidden_states=prefix, decoder_input_ids=tokens.flatten(0, 1)).logits
        logits = logits[:, -tokens.shape[-1] :]
    else:
        hidden = BaseModelOutput(last_hidden_state=text)
        logits = model(encoder_outputs=hidden, decoder_input_ids=tokens.flatten(0, 1)).logits
    return logits.unflatten(0, (2, codebooks))
