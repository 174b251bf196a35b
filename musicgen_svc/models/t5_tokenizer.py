"""Loads transformers' T5 tokenizer from files that are not trusted, and checks its tokens."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from musicgen_svc.checkpoints import part_field_tables as tables
from musicgen_svc.checkpoints.damage import check_not_damaged, name_exists
from musicgen_svc.checkpoints.field_types import read_fields
from musicgen_svc.checkpoints.tensor_files import read_json
from musicgen_svc.errors import WeightsError, first_line

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_CONFIG = "tokenizer_config.json"
BESIDE_TOKENIZER = (_CONFIG, "special_tokens_map.json", "added_tokens.json")


class PromptTokenizer:
    """transformers' `T5Tokenizer`, with a check that the encoder knows every token."""

    def __init__(self, tokenizer: Any, vocabulary: int, origin: str) -> None:
        """Wraps a tokenizer, and tries it with a short text.

        Args:
            tokenizer: transformers' tokenizer.
            vocabulary: the number of tokens that the encoder knows.
            origin: where the tokenizer was read from, for messages.

        Raises:
            WeightsError: it has tokens that the encoder does not know, or fails on the text.
        """
        self._tokenizer, self._vocabulary, self._origin = tokenizer, vocabulary, origin
        with _mapped_errors(origin):
            largest = max(tokenizer.get_vocab().values(), default=0)
        self._check(largest)
        self(["a melody", ""], return_tensors="pt", padding=True)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        """Tokenizes texts to `input_ids` and `attention_mask`; takes the options of transformers' tokenizer.

        Raises:
            WeightsError: the tokenizer fails, or its tokens are unknown to the encoder.
        """
        with _mapped_errors(self._origin):
            tokens = self._tokenizer(texts, **options)
            largest = int(tokens["input_ids"].max())
        self._check(largest)
        return tokens

    def _check(self, largest: int) -> None:
        """Checks that the encoder knows the token with the largest number."""
        if largest >= self._vocabulary:
            raise WeightsError(
                f"{self._origin} has a tokenizer with the token {largest}; the text encoder knows "
                f"{self._vocabulary} tokens, numbered from 0."
            )


def load_tokenizer(folder: Path, vocabulary: int) -> PromptTokenizer:
    """Loads T5's tokenizer from a folder of transformers. Never uses the network.

    Args:
        folder: the folder.
        vocabulary: the number of tokens that the encoder knows.

    Raises:
        WeightsError: there is no tokenizer, it cannot be read, or it does not fit the encoder.
    """
    _check_files(folder)
    config = folder / _CONFIG
    if config.is_file():
        read_fields(read_json(config), tables.TOKENIZER, "", str(config), skip_unknown=True)
    _check_charsmap(folder / TOKENIZER_FILES[0])
    from transformers import T5Tokenizer

    with _mapped_errors(str(folder)):
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    return PromptTokenizer(tokenizer, vocabulary, str(folder))


def _check_files(folder: Path) -> None:
    """Checks the files before transformers reads them.

    Raises:
        WeightsError: there is no tokenizer, one of its files is damaged, or one names files elsewhere.
    """
    present = [folder / name for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZER) if name_exists(folder / name)]
    if not any(path.name in TOKENIZER_FILES for path in present):  # transformers would make an empty one
        raise WeightsError(f"{folder} holds no tokenizer: {' or '.join(TOKENIZER_FILES)} is one.")
    for path in present:
        check_not_damaged(path)
        if path.suffix == ".json":
            names = read_json(path).get("fast_tokenizer_files", [])
            for name in names if isinstance(names, list) else [names]:
                if not isinstance(name, str) or name != Path(name).name:
                    raise WeightsError(f"{path} names {name!r:.80}, which is not in its folder.")


def _check_charsmap(file: Path) -> None:
    """Checks the length that SentencePiece's table of characters claims.

    The table begins with its length, and the library allocates as much memory before it reads the table.

    Raises:
        WeightsError: the table is shorter than it claims, or the file does not hold a tokenizer.
    """
    if not file.is_file():
        return
    normalizer = read_json(file).get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else [normalizer]
    for step in steps if isinstance(steps, list) else ():
        table = step.get("precompiled_charsmap") if isinstance(step, dict) else None
        if table is None:
            continue
        with _mapped_errors(str(file)):
            content = base64.b64decode(table)
        if int.from_bytes(content[:4], "little") > len(content):
            raise WeightsError(f"{file} does not hold T5's tokenizer: its precompiled_charsmap is cut short.")


@contextmanager
def _mapped_errors(origin: str) -> Iterator[None]:
    """Context manager that turns errors of transformers, and panics of its Rust library, into a WeightsError.

    A panic is a BaseException, which no handler up to the client would catch. Its class cannot be imported,
    so it is recognized by its name.

    Raises:
        WeightsError: for every such error.
    """
    try:
        yield
    except WeightsError:
        raise
    except BaseException as exc:
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise WeightsError(f"{origin} does not hold T5's tokenizer: {first_line(exc)}") from exc
