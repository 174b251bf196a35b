"""The demo model's text encoder: a small frozen T5 with random weights and a token for each word."""

import string
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from training.captions import words

WIDTH = 512  # audiocraft requires this width of a model with the name t5-small
PUNCTUATION = string.digits + ".,;:!?'\"()&%#/+-"
WORD_SCORE, LETTER_SCORE = -2.0, -5.0  # log probabilities, so that a known word is one token


def save_text_encoder(folder: Path) -> None:
    """Writes the encoder and its tokenizer in the format of transformers. The bytes are the same every time.

    A word in lower, upper and mixed case has different tokens with the same embedding. An unknown word is
    tokenized letter by letter.
    """
    same = {letter: [letter.upper()] for letter in string.ascii_lowercase}
    for word in words():
        variants = dict.fromkeys((f"▁{word.capitalize()}", f"▁{word.upper()}"))
        same[f"▁{word}"] = [other for other in variants if other != f"▁{word}"]
    found = [*same, *PUNCTUATION, *(other for others in same.values() for other in others)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [
        (piece, WORD_SCORE if len(piece) > 1 else LETTER_SCORE)
        for piece in dict.fromkeys(found)
        if piece != "▁"
    ]
    tokenizer: Any = T5Tokenizer(vocab=pieces)
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        encoder = T5EncoderModel(config)
        embeddings: Any = encoder.get_input_embeddings().weight
        for piece, others in same.items():
            for other in others:
                embeddings[ids[other]] = embeddings[ids[piece]]
    encoder.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class TextEncoder:
    """Encodes captions with T5; the states of each caption are computed once and kept."""

    def __init__(self, folder: Path) -> None:
        """Loads what `save_text_encoder` wrote."""
        self._t5 = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        self._tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
        self._known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, caption: str) -> Tensor:
        """Returns T5's states of a caption, [N, 512]; N counts the end token too."""
        if caption not in self._known:
            inputs = self._tokenizer([caption], return_tensors="pt")
            self._known[caption] = self._t5(**inputs).last_hidden_state[0]
        return self._known[caption]

    def length(self, caption: str) -> int:
        """Returns the length of a caption in tokens, with the end token."""
        return len(self._tokenizer(caption)["input_ids"])
