"""Tiny language models, and their logits: by audiocraft's own model, and by ours as it is loaded."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from musicgen_svc.audiocraft_compat import LMModel, builders
from musicgen_svc.checkpoints import Checkpoint
from musicgen_svc.models.conditioners import Conditioner, TextConditioner, build_melody_conditioner
from musicgen_svc.models.language_model import LazyLM
from tests.fixtures import tiny_codecs, tiny_models

CPU = torch.device("cpu")
PROVIDER = "condition_provider.conditioners."
Package = dict[str, Any]


def config_of(name: str) -> Package:
    """A released model's configuration with tiny sizes, and with heads of 64 as the released models have."""
    config = tiny_models.lm_config(name)
    config["transformer_lm"]["num_heads"] = 1
    return config


def lm_of(config: Package, seed: int = 0) -> dict[str, torch.Tensor]:
    """A language model's weights, fp32."""
    with tiny_codecs.seeded(seed):
        state = tiny_models.lm_checkpoint(config)["best_state"]
    return {name: tensor.float() for name, tensor in state.items()}


def codec_package() -> Package:
    """The package that audiocraft's export writes for a codec."""
    with tiny_codecs.seeded(1):
        return tiny_codecs.codec_checkpoint()


def inputs(codebooks: int, card: int, text_width: int, chroma: bool) -> tuple[torch.Tensor, ...]:
    """Tokens [2, K, 7], text [2, 5, W] and, for a melody, chroma [2, 235, 12]."""
    random = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, card + 1, (2, codebooks, 7), generator=random)
    text = torch.randn(2, 5, text_width, generator=random)
    return tokens, text, *([torch.rand(2, 235, 12, generator=random)] if chroma else [])


def build(checkpoint: Checkpoint) -> LMModel:
    """The language model that the service would run, without T5 and Demucs."""
    width = checkpoint.state[PROVIDER + "description.output_proj.weight"].shape[1]
    text = TextConditioner(nn.Identity(), None, width, checkpoint.config.transformer_lm.dim)
    melody = None
    if "self_wav" in checkpoint.config.conditioners:
        melody = build_melody_conditioner(checkpoint.config, lambda wav, _: wav, 32_000, CPU)
    return build_lm(checkpoint, Conditioner(text, melody), CPU)


def build_lm(checkpoint: Checkpoint, conditioner: Conditioner, device: torch.device) -> LMModel:
    """Loads a language model with all its layers, which the service loads one at a time."""
    lazy = LazyLM(checkpoint.config, checkpoint.origin, device)
    lm = lazy.open(checkpoint, conditioner)
    for part in (*lm.transformer.layers, lm.linears):
        lazy.load(part)
    return lm


@torch.inference_mode()
def logits(checkpoint: Checkpoint) -> torch.Tensor:
    """The logits [2, K, 7, card] of the loaded model."""
    lm = build(checkpoint)
    own = lm.condition_provider.conditioners
    width = own["description"].output_proj.in_features
    tokens, text, *chroma = inputs(lm.n_q, lm.card, width, "self_wav" in own)
    return lm(tokens, [], _conditions(text, chroma, lambda name: own[name].output_proj))


@torch.inference_mode()
def reference_logits(config: Package, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits [2, K, 7, card] of audiocraft's own model of a configuration."""
    without = OmegaConf.create(config | {"device": "cpu", "dtype": "float32", "conditioners": {}})
    lm = builders.get_lm_model(without).eval()
    lm.load_state_dict({name: t for name, t in state.items() if not name.startswith(PROVIDER)})
    size = config["transformer_lm"]
    width = state[PROVIDER + "description.output_proj.weight"].shape[1]
    tokens, text, *chroma = inputs(size["n_q"], size["card"], width, "self_wav" in config["conditioners"])

    def projection(name: str) -> nn.Module:
        prefix = f"{PROVIDER}{name}.output_proj."
        linear = nn.Linear(*reversed(state[prefix + "weight"].shape))
        linear.load_state_dict({part: state[prefix + part] for part in ("weight", "bias")})
        return linear

    return lm(tokens, [], _conditions(text, chroma, projection))


def _conditions(text: torch.Tensor, chroma: list[torch.Tensor], projection: Any) -> dict[str, Any]:
    """The condition tensors: each projected input [2, S, D], with a mask [2, S] of ones."""
    hidden = {"description": text} | ({"self_wav": chroma[0]} if chroma else {})
    return {name: (projection(name)(x), torch.ones(x.shape[:2])) for name, x in hidden.items()}


def dict_config(config: Package) -> DictConfig:
    """The configuration as a running audiocraft has it: an OmegaConf object that takes no new entries."""
    created = OmegaConf.create(config)
    OmegaConf.set_struct(created, True)
    return created
