"""Text to token ids and back: sentencepiece BPE or unigram, characters, words, words with ends, byte-level BPE.

All kinds share one rule for spaces: U+2581 stands for the space before a word, so joining the symbols and replacing
that sign gives the text; of byte-level BPE, the text written by ``byte_symbols``. Exported ``tokens.txt`` files rely on
it.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import sentencepiece

from asr.data.byte_symbols import BYTE_SYMBOLS, is_inside, read_bytes, recover, write_bytes
from asr.errors import UserError

Kind = Literal["bpe", "unigram", "char", "word", "word_end", "byte_bpe"]
KINDS: tuple[str, ...] = get_args(Kind)
BLANK = "<blk>"
UNKNOWN = "<unk>"
SPACE = "\u2581"
STATE_FORMAT = 1
SENTENCEPIECE = ("bpe", "unigram", "byte_bpe")
"""Kinds that sentencepiece makes."""


@dataclass
class TokenizerConfig:
    """What the model writes.

    Args:
        kind: bpe or unigram (pieces of words, by sentencepiece), char (every character), word (every word), or word_end
            (every word, and a token for its end behind each). A predictor that sees the last few tokens only cannot
            tell the second of two equal words from the first, so word spreads their emissions over many frames;
            word_end lets every emission change what the predictor sees. For small closed vocabularies with
            repetitions, such as digit strings. byte_bpe is bpe over the UTF-8 bytes of the text (Wang et al. 2019,
            "Neural Machine Translation with Byte-Level Subwords"): for writing with thousands of characters; it can
            spell every text.
        vocab_size: number of tokens with blank and the unknown token, for bpe, unigram and byte_bpe (258 at least); the
            others take what the training texts hold.
    """

    kind: Kind = "bpe"
    vocab_size: int = 500

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size={self.vocab_size}; at least 3 are needed (blank, unknown, one piece)")
        if self.kind == "byte_bpe" and self.vocab_size < len(BYTE_SYMBOLS) + 2:
            least = len(BYTE_SYMBOLS) + 2
            raise ValueError(
                f"vocab_size={self.vocab_size}; byte_bpe needs at least {least} (blank, unknown, every byte)"
            )


class UnknownToken(UserError):
    """A text holds something that the tokenizer has no token for."""

    def __init__(self, token: str, text: str) -> None:
        super().__init__(f"token {token!r} of the text {text!r} is not in the tokenizer")
        self.token = token
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        return (UnknownToken, (self.token, self.text))


class Tokenizer:
    """Maps text to token ids and back. Id 0 is blank, which no text encodes to.

    sentencepiece models also have an unknown token, id 1; ``encode`` raises UnknownToken where it would be used. Make
    one with ``train``, ``from_state`` or ``load``.
    """

    def __init__(self, kind: Kind, symbols: Sequence[str], model: bytes = b"") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}; it must be one of {', '.join(KINDS)}")
        self.kind: Kind = kind
        self._model = model
        self._processor: sentencepiece.SentencePieceProcessor | None = None
        if kind in SENTENCEPIECE:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            symbols = [self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size())]
        if not symbols or symbols[0] != BLANK:
            raise ValueError(f"the first symbol must be {BLANK}, got {list(symbols[:1])}")
        if len(set(symbols)) != len(symbols):
            raise ValueError("a symbol appears twice in the tokenizer")
        self._symbols = list(symbols)
        self._ids = {symbol: i for i, symbol in enumerate(self._symbols)}

    @staticmethod
    def train(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
        """Learn the tokens from texts; equal texts give equal tokenizers.

        Raises:
            UserError: there is no text, or ``vocab_size`` does not fit the texts (the message has the limit).
        """
        lines = [line for line in (_normalise(text) for text in texts) if line]
        if not lines:
            raise UserError("no text to train the tokenizer on: all transcripts are empty")
        if config.kind == "byte_bpe":
            return Tokenizer("byte_bpe", [], _train_sentencepiece([_written(line, line) for line in lines], config))
        for line in lines:
            if SPACE in line:
                raise UserError(f"the text {line!r} holds U+2581, which stands for spaces in tokens; remove it")
        if config.kind == "char":
            characters = {character for line in lines for character in line}
            return Tokenizer("char", [BLANK, *sorted(SPACE if c == " " else c for c in characters)])
        if config.kind == "word":
            words = {word for line in lines for word in line.split(" ")}
            return Tokenizer("word", [BLANK, *sorted(SPACE + word for word in words)])
        if config.kind == "word_end":
            words = {word for line in lines for word in line.split(" ")}
            return Tokenizer("word_end", [BLANK, SPACE, *sorted(words)])
        return Tokenizer(config.kind, [], _train_sentencepiece(lines, config))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; spaces at the ends and repeated spaces do not count.

        Raises:
            UnknownToken: a part of the text has no token.
        """
        line = _normalise(text)
        if self.kind == "byte_bpe":
            line = _written(line, text)
        elif SPACE in line:
            raise UnknownToken(SPACE, text)
        if self._processor is not None:
            ids: list[int] = self._processor.encode(line)
            unknown = self._processor.unk_id()
            if unknown in ids:
                raise UnknownToken(self._processor.encode(line, out_type=str)[ids.index(unknown)].lstrip(SPACE), text)
            return ids
        if not line:
            return []
        ids = []
        parts: Iterable[str] = line.replace(" ", SPACE)
        if self.kind == "word":
            parts = [SPACE + word for word in line.split(" ")]
        elif self.kind == "word_end":
            parts = [part for word in line.split(" ") for part in (word, SPACE)]
        for part in parts:
            token = self._ids.get(part)
            if token is None:
                raise UnknownToken(" " if part == SPACE else part.lstrip(SPACE), text)
            ids.append(token)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; blank and unknown give nothing, nor do bytes that are no characters.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return _normalise("".join(character for character, _ in self.characters(ids)))

    def characters(self, ids: Iterable[int]) -> list[tuple[str, Sequence[int]]]:
        """What token ids spell, character by character with spaces, each with the positions of its tokens; of byte_bpe
        several tokens may hold the bytes of one.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        parts = []
        for token in ids:
            if not 0 <= token < len(self._symbols):
                raise ValueError(f"token id {token} is outside the vocabulary of {len(self._symbols)}")
            symbol = self._symbols[token]
            parts.append("" if symbol in (BLANK, UNKNOWN) else symbol.replace(SPACE, " "))
        if self.kind == "byte_bpe":
            return recover(map(read_bytes, parts))
        return [(character, (position,)) for position, part in enumerate(parts) for character in part]

    def spelling(self) -> list[list[int]]:
        """Of each id those of its characters (of byte_bpe, bytes), which sentencepiece has among its pieces; of blank
        and unknown none.

        Raises:
            UserError: tokens are whole words, whose characters are no tokens.
        """
        if self.kind in ("word", "word_end"):
            raise UserError(
                f"tokenizer.kind={self.kind} has no tokens for characters; use bpe, unigram, byte_bpe or char"
            )
        return [
            [] if symbol in (BLANK, UNKNOWN) else [self._ids[character] for character in symbol]
            for symbol in self._symbols
        ]

    @property
    def inside(self) -> frozenset[int]:
        """The tokens that go on within a character; only byte_bpe has such."""
        if self.kind != "byte_bpe":
            return frozenset()
        return frozenset(token for token, symbol in enumerate(self._symbols) if is_inside(symbol))

    def shown(self, token: int) -> str:
        """The symbol of a token for people: bytes that are whole characters as such, others as numbers."""
        symbol = self._symbols[token]
        if self.kind != "byte_bpe" or symbol in (BLANK, UNKNOWN):
            return symbol
        space, rest = symbol[: symbol.startswith(SPACE)], symbol.removeprefix(SPACE)
        data = read_bytes(rest)
        try:
            return space + data.decode("utf-8")
        except UnicodeDecodeError:
            return space + f"[{data.hex(' ').upper()}]"

    def join(self, texts: Sequence[str]) -> str:
        """One text of several, with a space between where texts have spaces. Its tokens are theirs, and at most one
        between two."""
        spaced = self.kind != "char" or SPACE in self._ids
        return (" " if spaced else "").join(text.strip() for text in texts)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, blank included."""
        return len(self._symbols)

    @property
    def symbols(self) -> list[str]:
        """The token of each id; U+2581 stands for a space."""
        return list(self._symbols)

    @property
    def sentencepiece_model(self) -> bytes:
        """The model of the kinds that sentencepiece makes; empty for the others."""
        return self._model

    @property
    def sentencepiece_scores(self) -> list[tuple[str, float]]:
        """Piece and score of each id that sentencepiece made, as its vocabulary files have them."""
        if self._processor is None:
            return []
        return [(symbol, self._processor.get_score(i)) for i, symbol in enumerate(self._symbols)]

    def to_state(self) -> dict[str, str | int | list[str]]:
        """Everything as a dict that JSON can hold, for checkpoints."""
        state: dict[str, str | int | list[str]] = {"format": STATE_FORMAT, "kind": self.kind}
        if self._model:
            state["sentencepiece"] = base64.b64encode(self._model).decode("ascii")
        else:
            state["symbols"] = list(self._symbols)
        return state

    @staticmethod
    def from_state(state: dict[str, Any]) -> Tokenizer:
        """The tokenizer that ``to_state`` described. Raises ValueError for anything else."""
        if not isinstance(state, dict) or "kind" not in state:
            raise ValueError("this is not the state of a tokenizer: it has no kind")
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"tokenizer format {state.get('format')!r} is unknown; this version reads {STATE_FORMAT}")
        if state["kind"] not in KINDS:
            raise ValueError(f"kind={state['kind']!r}; it must be one of {', '.join(KINDS)}")
        field = "sentencepiece" if state["kind"] in SENTENCEPIECE else "symbols"
        if field not in state:
            raise ValueError(f"the state of a {state['kind']} tokenizer needs {field!r}")
        if field == "symbols":
            return Tokenizer(state["kind"], state["symbols"])
        try:
            return Tokenizer(state["kind"], [], base64.b64decode(state["sentencepiece"], validate=True))
        except RuntimeError as error:
            raise ValueError(f"the sentencepiece model of the tokenizer is broken: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file; a reader sees the old file or the new one, never a part."""
        _write_atomically(Path(path), json.dumps(self.to_state(), ensure_ascii=False, indent=1) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Tokenizer:
        """Read what ``save`` wrote. Raises UserError when the file is missing or is not a tokenizer."""
        try:
            return Tokenizer.from_state(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}; run the tokenizer stage") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not a tokenizer: {error}") from error

    def write_tokens_txt(self, path: str | os.PathLike[str]) -> None:
        """Write one ``symbol id`` per line, the form of k2 and of device runtimes."""
        _write_atomically(Path(path), "".join(f"{symbol} {i}\n" for i, symbol in enumerate(self._symbols)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_state() == other.to_state()

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self._symbols)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tokenizer.from_state, (self.to_state(),))


def _train_sentencepiece(lines: list[str], config: TokenizerConfig) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.kind.removeprefix("byte_"),
            # of bytes all are there, also those that the texts do not hold; a space is one by itself
            required_chars="".join(BYTE_SYMBOLS).replace(" ", "") if config.kind == "byte_bpe" else "",
            vocab_size=config.vocab_size,
            # pad takes id 0 and is never produced: the place of blank
            pad_id=0,
            pad_piece=BLANK,
            unk_id=1,
            unk_piece=UNKNOWN,
            bos_id=-1,
            eos_id=-1,
            character_coverage=1.0,
            # transcripts are taken as they are: what a text looks like is the corpus's decision
            normalization_rule_name="identity",
            max_sentence_length=1 << 20,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), config)) from error
    return model.getvalue()


def _written(line: str, text: str) -> str:
    try:
        return write_bytes(line)
    except UnicodeEncodeError as error:
        raise UnknownToken(line[error.start], text) from None


def _explain(message: str, config: TokenizerConfig) -> str:
    """sentencepiece names its source lines; people need the limit."""
    limit = re.search(r"(?:value|size)\s*<=\s*(\d+)", message)
    if limit is not None:
        return (
            f"vocab_size={config.vocab_size} is too large for these texts; {config.kind} reaches at most "
            f"{limit.group(1)}, set tokenizer.vocab_size to that or less"
        )
    least = re.search(r"(\d+)\s*vs\s*(\d+)", message)
    if "smaller than required_chars" in message and least is not None:
        return (
            f"vocab_size={config.vocab_size} is too small: the texts hold {least.group(2)} "
            f"different characters and special tokens; set tokenizer.vocab_size above that"
        )
    return f"sentencepiece cannot train a {config.kind} tokenizer with vocab_size={config.vocab_size}: {message}"


def _normalise(text: str) -> str:
    return " ".join(text.split())


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
