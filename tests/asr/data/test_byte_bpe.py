"""Byte-level BPE: every text can be spelt, and of bytes that are none, all characters are found that can be."""

from __future__ import annotations

import pickle
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.data.byte_symbols import BYTE_SYMBOLS, read_bytes, recover, write_bytes
from asr.data.tokenizer import SPACE, Tokenizer, TokenizerConfig, UnknownToken

TEXTS = ["今天天气很好", "上海孙中山故居纪念馆", "有网友曝光一段视频显示", "TCUBE大楼", "HELLO 你好"] * 4
TOKENIZER = Tokenizer.train(TEXTS, TokenizerConfig("byte_bpe", 300))

CHINESE = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=20)
EMOJI = st.text(st.sampled_from("\U0001f600\U0001f468\u200d\U0001f469\U0001f1e9\U0001f1ea\u2764\ufe0f"), max_size=8)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
MIXED = st.lists(st.one_of(CHINESE, EMOJI, ANY, st.sampled_from([" ", "\u3000", SPACE, "<unk>", "<blk>"]))).map("".join)


def most_characters(data: bytes) -> int:
    """Equation 1 of Wang et al. 2019: f(k) = max over t of f(k - t) + g(k - t, k)."""
    best = [0]
    for k in range(1, len(data) + 1):
        options = []
        for t in range(1, min(4, k) + 1):
            try:
                good = len(data[k - t : k].decode("utf-8")) == 1
            except UnicodeDecodeError:
                good = False
            options.append(best[k - t] + good)
        best.append(max(options))
    return best[-1]


@settings(max_examples=300)
@given(text=MIXED)
def test_every_text_can_be_spelt(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == " ".join(text.split())
    assert all(1 < token < TOKENIZER.vocab_size for token in tokens), "neither blank nor <unk>"


@settings(max_examples=300)
@given(tokens=st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60))
def test_any_tokens_have_a_text(tokens: list[int]) -> None:
    spelt = TOKENIZER.characters(tokens)
    assert TOKENIZER.decode(tokens) == " ".join("".join(character for character, _ in spelt).split())
    positions = [position for _, used in spelt for position in used]
    assert positions == sorted(positions) and set(positions) <= set(range(len(tokens)))


@settings(max_examples=300)
@given(
    parts=st.lists(st.one_of(st.binary(max_size=6), st.text(max_size=2).map(lambda t: t.encode("utf-8", "ignore")))),
    cut=st.integers(0, 3),
)
def test_as_many_characters_are_found_as_there_can_be(parts: list[bytes], cut: int) -> None:
    data = b"".join(parts)[cut:]
    found = recover([data])
    assert len(found) == most_characters(data)
    assert "".join(character for character, _ in found) == data.decode("utf-8", "ignore")


@given(data=st.binary())
def test_bytes_are_written_as_printable_characters_and_read_again(data: bytes) -> None:
    assert read_bytes("".join(BYTE_SYMBOLS[byte] for byte in data)) == data


def test_symbols_are_fit_for_a_list_of_tokens() -> None:
    assert len(set(BYTE_SYMBOLS)) == 256
    assert [symbol for symbol in BYTE_SYMBOLS if symbol.isspace()] == [" "] and SPACE not in BYTE_SYMBOLS
    assert all(symbol.isprintable() and unicodedata.normalize("NFC", symbol) == symbol for symbol in BYTE_SYMBOLS)
    assert write_bytes("a 你") == "a \u018b\u0163\u0145"


def test_bytes_that_are_no_character_are_dropped() -> None:
    one, two = "你".encode(), "好".encode()
    assert recover([one[:2], two[:1], two[1:]]) == [("好", [1, 2, 2])]
    assert recover([one[:1] + b"a" + one[1:], two]) == [("a", [0]), ("好", [1, 1, 1])]
    assert recover([b"\xed\xa0\x80\xff\xc0\x80"]) == []
    assert recover([]) == []


def test_frequent_characters_are_tokens_of_their_own() -> None:
    tokens = TOKENIZER.encode("今天天气")
    assert len(tokens) < len("今天天气".encode())
    assert "好" in [TOKENIZER.shown(token) for token in TOKENIZER.encode("你好")]
    assert TOKENIZER.shown(TOKENIZER.symbols.index(BYTE_SYMBOLS[0xE4])) == "[E4]"
    assert [TOKENIZER.shown(token) for token in (0, 1)] == ["<blk>", "<unk>"]
    inside = {TOKENIZER.symbols[token] for token in TOKENIZER.inside}
    assert {BYTE_SYMBOLS[byte] for byte in range(0x80, 0xC0)} <= inside
    assert not inside & {BYTE_SYMBOLS[0x41], BYTE_SYMBOLS[0xE4], SPACE, "<blk>"}


def test_it_is_learnt_saved_and_loaded_alike() -> None:
    assert Tokenizer.train(TEXTS, TokenizerConfig("byte_bpe", 300)) == TOKENIZER
    again = Tokenizer.from_state(TOKENIZER.to_state())
    assert again == TOKENIZER == pickle.loads(pickle.dumps(TOKENIZER))
    assert again.encode("今天 \U0001f600") == TOKENIZER.encode("今天 \U0001f600")


def test_limits_are_told() -> None:
    with pytest.raises(ValueError, match="vocab_size=257; byte_bpe needs at least 258"):
        TokenizerConfig("byte_bpe", 257)
    assert Tokenizer.train(["a"], TokenizerConfig("byte_bpe", 258)).vocab_size == 258
    with pytest.raises(UnknownToken, match="is not in the tokenizer"):
        TOKENIZER.encode("half a pair: \ud83d")
