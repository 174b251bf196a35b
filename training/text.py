"""The demo model's text encoder: a small random T5, frozen, that knows the captions' words."""

import string
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from training.captions import words

WIDTH = 512  # audiocraft knows t5-small by its name and holds it to this width
SIGNS = string.digits + ".,;:!?'\"()&%#/+-"
WORD, LETTER = -2.0, -5.0  # log probabilities: whole words before spelling


def save_text_encoder(folder: Path) -> None:
    """Writes encoder and tokenizer as transformers lays them out. The same bytes every time.

    A word means the same in small, capital and mixed letters: the tokenizer tells them apart, so their
    embeddings are made equal. Unknown words are spelled.
    """
    same = {letter: [letter.upper()] for letter in string.ascii_lowercase}
    for word in words():
        variants = dict.fromkeys((f"▁{word.capitalize()}", f"▁{word.upper()}"))
        same[f"▁{word}"] = [other for other in variants if other != f"▁{word}"]
    found = [*same, *SIGNS, *(other for others in same.values() for other in others)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(piece, WORD if len(piece) > 1 else LETTER) for piece in dict.fromkeys(found) if piece != "▁"]
    tokenizer: Any = T5Tokenizer(vocab=pieces)
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        encoder = T5EncoderModel(config)
        embeddings: Any = encoder.get_input_embeddings().weight
        for spelled, others in same.items():
            for other in others:
                embeddings[ids[other]] = embeddings[ids[spelled]]
    encoder.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class TextEncoder:
    """Captions -> T5's states; each is computed once."""

    def __init__(self, folder: Path) -> None:
        self._t5 = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        self._tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
        self._known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, caption: str) -> Tensor:
        """[N, 512], N tokens with the end mark."""
        if caption not in self._known:
            inputs = self._tokenizer([caption], return_tensors="pt")
            self._known[caption] = self._t5(**inputs).last_hidden_state[0]
        return self._known[caption]

    def length(self, caption: str) -> int:
        """In tokens, with the end mark."""
        return len(self._tokenizer(caption)["input_ids"])
