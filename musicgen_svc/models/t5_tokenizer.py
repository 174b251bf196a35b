"""T5's tokenizer, which is transformers', around files that a stranger may have written."""

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
    """transformers' `T5Tokenizer`, whose tokens are ones that the encoder has an embedding of."""

    def __init__(self, tokenizer: Any, vocabulary: int, origin: str) -> None:
        """
        Args:
            vocabulary: how many tokens the encoder has an embedding of.
            origin: where the tokenizer was read from, for messages.

        Raises:
            WeightsError: it knows tokens that the encoder does not, or fails on a short text.
        """
        self._tokenizer, self._vocabulary, self._origin = tokenizer, vocabulary, origin
        with _understood(origin):
            greatest = max(tokenizer.get_vocab().values(), default=0)
        self._check(greatest)
        self(["a melody", ""], return_tensors="pt", padding=True)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        """Texts -> `input_ids` and `attention_mask`, as transformers' tokenizer takes and gives them.

        Raises:
            WeightsError: the tokenizer fails on them, or makes tokens that the encoder does not know.
        """
        with _understood(self._origin):
            tokens = self._tokenizer(texts, **options)
            greatest = int(tokens["input_ids"].max())
        self._check(greatest)
        return tokens

    def _check(self, greatest: int) -> None:
        if greatest >= self._vocabulary:
            raise WeightsError(
                f"{self._origin} has a tokenizer with the token {greatest}; the text encoder knows "
                f"{self._vocabulary} tokens, numbered from 0."
            )


def load_tokenizer(folder: Path, vocabulary: int) -> PromptTokenizer:
    """T5's tokenizer in a folder of transformers.

    Args:
        vocabulary: how many tokens the encoder has an embedding of.

    Raises:
        WeightsError: there is none, it cannot be read, or it does not fit the encoder.
    """
    _check_files(folder)
    config = folder / _CONFIG
    if config.is_file():
        read_fields(read_json(config), tables.TOKENIZER, "", str(config), skip_unknown=True)
    _check_charsmap(folder / TOKENIZER_FILES[0])
    from transformers import T5Tokenizer

    with _understood(str(folder)):
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    return PromptTokenizer(tokenizer, vocabulary, str(folder))


def _check_files(folder: Path) -> None:
    """Looks at the files before transformers does.

    Raises:
        WeightsError: there is no tokenizer, one of its files is damaged, or one names files elsewhere.
    """
    present = [folder / name for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZER) if name_exists(folder / name)]
    if not any(path.name in TOKENIZER_FILES for path in present):  # transformers would make one up
        raise WeightsError(f"{folder} holds no tokenizer: {' or '.join(TOKENIZER_FILES)} is one.")
    for path in present:
        check_not_damaged(path)
        if path.suffix == ".json":
            names = read_json(path).get("fast_tokenizer_files", [])
            for name in names if isinstance(names, list) else [names]:
                if not isinstance(name, str) or name != Path(name).name:
                    raise WeightsError(f"{path} names {name!r:.80}, which is not in its folder.")


def _check_charsmap(file: Path) -> None:
    """SentencePiece's table of characters says its own length first, and so much memory is asked for.

    Raises:
        WeightsError: there is less of it, or the file is no tokenizer's.
    """
    if not file.is_file():
        return
    normalizer = read_json(file).get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else [normalizer]
    for step in steps if isinstance(steps, list) else ():
        table = step.get("precompiled_charsmap") if isinstance(step, dict) else None
        if table is None:
            continue
        with _understood(str(file)):
            content = base64.b64decode(table)
        if int.from_bytes(content[:4], "little") > len(content):
            raise WeightsError(f"{file} does not hold T5's tokenizer: its precompiled_charsmap is cut short.")


@contextmanager
def _understood(origin: str) -> Iterator[None]:
    """Whatever transformers raises over a file is the file's fault, and so is a panic of its Rust library.

    A panic is a BaseException, which would get past every handler up to the client. Its class has no
    importable name.
    """
    try:
        yield
    except WeightsError:
        raise
    except BaseException as exc:
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise WeightsError(f"{origin} does not hold T5's tokenizer: {first_line(exc)}") from exc
