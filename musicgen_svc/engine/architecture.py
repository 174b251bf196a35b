"""Checks that a language model is built like the released MusicGen models, which `Decoder` computes."""

from torch import nn

from musicgen_svc.audiocraft_compat import DelayedPatternProvider, LMModel
from musicgen_svc.errors import WeightsError


def check_architecture(lm: LMModel) -> None:
    """Refuses a language model that `Decoder` would compute wrongly.

    Raises:
        WeightsError: the model has a property that no released MusicGen has. The error names the property.
    """
    layers = lm.transformer.layers
    attentions = [layer.self_attn for layer in layers] + [
        layer.cross_attention for layer in layers if layer.cross_attention is not None
    ]
    pattern = lm.pattern_provider
    requirements = {
        "a delay pattern": isinstance(pattern, DelayedPatternProvider)
        and not (pattern.flatten_first or pattern.empty_initial or min(pattern.delays)),
        "sinusoidal positions": lm.transformer.positional_embedding == "sin",
        "norms before the blocks": all(layer.norm_first for layer in layers) and lm.out_norm is not None,
        "causal attention over the whole past": all(
            layer.self_attn.causal and layer.self_attn.past_context is None for layer in layers
        ),
        "attention without norms or shared keys": all(
            a.custom and not a.qk_layer_norm and a.kv_repeat == 1 for a in attentions
        ),
        "projections without biases": not any(
            isinstance(m, nn.Linear) and m.bias is not None for m in (*lm.transformer.modules(), *lm.linears)
        )
        and all(a.in_proj_bias is None for a in attentions),
        "layers without scales": all(isinstance(layer.layer_scale_1, nn.Identity) for layer in layers),
        "prepended or cross-attended conditions": not any(
            names for how, names in lm.fuser.fuse2cond.items() if how not in ("prepend", "cross")
        ),
    }
    for requirement, met in requirements.items():
        if not met:
            raise WeightsError(
                f"The language model cannot be decoded: {requirement} was expected, "
                "as in every released MusicGen."
            )
