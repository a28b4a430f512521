from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr.data.tokenizer import SPACE, Tokenizer, TokenizerConfig, UnknownToken
from asr.errors import UserError

TEXTS = [
    "ONE TWO THREE",
    "FOUR FIVE SIX SEVEN",
    "EIGHT NINE ZERO OH",
    "THE SEVENTH NUMBER IS FOURTEEN",
    "DON'T TELL SIXTY NINETEEN",
] * 4
CONFIGS = {
    "bpe": TokenizerConfig("bpe", 50),
    "unigram": TokenizerConfig("unigram", 35),
    "char": TokenizerConfig("char"),
    "word": TokenizerConfig("word"),
    "byte_bpe": TokenizerConfig("byte_bpe", 270),
}
TOKENIZERS = {kind: Tokenizer.train(TEXTS, config) for kind, config in CONFIGS.items()}


@pytest.fixture(params=list(CONFIGS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def test_round_trip(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 < token < tokenizer.vocab_size for token in ids)
        assert "<unk>" not in {tokenizer.symbols[token] for token in ids}


@given(words=st.lists(st.sampled_from(" ".join(TEXTS).split()), max_size=8), kind=st.sampled_from(list(CONFIGS)))
def test_round_trip_of_new_sentences(words: list[str], kind: str) -> None:
    text = " ".join(words)
    assert TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(text)) == text


def test_spaces_around_words_do_not_count(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("  ONE \t TWO\n") == tokenizer.encode("ONE TWO")
    assert tokenizer.encode(" ") == []
    assert tokenizer.decode([]) == ""


def test_blank_is_first_and_sizes_fit(tokenizer: Tokenizer) -> None:
    assert tokenizer.symbols[0] == "<blk>"
    assert len(tokenizer.symbols) == len(set(tokenizer.symbols)) == tokenizer.vocab_size
    if tokenizer.kind in ("bpe", "unigram", "byte_bpe"):
        assert tokenizer.vocab_size == CONFIGS[tokenizer.kind].vocab_size
    else:
        assert "<unk>" not in tokenizer.symbols
    assert tokenizer.decode([0, *tokenizer.encode("ONE"), 0]) == "ONE"


def test_joined_symbols_give_the_text(tokenizer: Tokenizer) -> None:
    """What a device runtime does with tokens.txt."""
    joined = "".join(tokenizer.symbols[token] for token in tokenizer.encode("FOUR FIVE"))
    assert joined.replace(SPACE, " ").strip() == "FOUR FIVE"


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "byte_bpe"])
def test_unknown_tokens_are_named_with_their_text(kind: str) -> None:
    with pytest.raises(UnknownToken) as caught:
        TOKENIZERS[kind].encode("ONE QUÜRK TWO")
    assert "ONE QUÜRK TWO" in str(caught.value)
    assert caught.value.text == "ONE QUÜRK TWO"
    assert caught.value.token in "QUÜRK" and caught.value.token in str(caught.value)
    assert isinstance(caught.value, UserError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "byte_bpe"])
def test_the_sign_for_spaces_is_no_text(kind: str) -> None:
    with pytest.raises(UnknownToken):
        TOKENIZERS[kind].encode(f"ONE{SPACE}TWO")
    with pytest.raises(UserError, match="U\\+2581"):
        Tokenizer.train([f"ONE{SPACE}TWO"], CONFIGS[kind])


def test_state_goes_through_json(tokenizer: Tokenizer) -> None:
    state = json.loads(json.dumps(tokenizer.to_state()))
    again = Tokenizer.from_state(state)
    assert again == tokenizer and again.kind == tokenizer.kind
    assert again.symbols == tokenizer.symbols
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_pickle_and_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    tokenizer.save(tmp_path / "lang" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "lang" / "tokenizer.json") == tokenizer
    assert [path.name for path in (tmp_path / "lang").iterdir()] == ["tokenizer.json"]
    tokenizer.write_tokens_txt(tmp_path / "tokens.txt")
    rows = [line.split(" ") for line in (tmp_path / "tokens.txt").read_text(encoding="utf-8").splitlines()]
    assert [(symbol, int(number)) for symbol, number in rows] == [(s, i) for i, s in enumerate(tokenizer.symbols)]


def test_training_gives_the_same_tokenizer_each_time(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(TEXTS, CONFIGS[tokenizer.kind]) == tokenizer


def test_ideographs_are_characters() -> None:
    tokenizer = Tokenizer.train(["今天天气好", "你好 世界"], TokenizerConfig("char"))
    assert tokenizer.decode(tokenizer.encode("你好 天气")) == "你好 天气"
    assert len(tokenizer.encode("你好 天气")) == 5


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("bpe", 5000, "too large for these texts; bpe reaches at most [0-9]+"),
        ("unigram", 5000, "too large for these texts; unigram reaches at most [0-9]+"),
        ("bpe", 10, "too small: the texts hold [0-9]+ different"),
        ("unigram", 10, "too small: the texts hold [0-9]+ different"),
    ],
)
def test_sizes_that_do_not_fit_name_the_limit(kind: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer.train(TEXTS, TokenizerConfig(kind, size))


def test_the_largest_size_that_is_named_works() -> None:
    with pytest.raises(UserError) as caught:
        Tokenizer.train(TEXTS, TokenizerConfig("bpe", 5000))
    largest = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert Tokenizer.train(TEXTS, TokenizerConfig("bpe", largest)).vocab_size == largest


def test_no_text_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="all transcripts are empty"):
        Tokenizer.train(["", "  "], CONFIGS[tokenizer.kind])


def test_ids_outside_the_vocabulary_are_an_error(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([token])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no kind"),
        ({"kind": "char", "format": 99}, "format 99"),
        ({"kind": "char", "format": 1}, "needs 'symbols'"),
        ({"kind": "morse", "format": 1, "sentencepiece": ""}, "kind='morse'"),
        ({"kind": "char", "format": 1, "symbols": ["A", "B"]}, "first symbol must be <blk>"),
        ({"kind": "char", "format": 1, "symbols": ["<blk>", "B", "B"]}, "twice"),
        ({"kind": "bpe", "format": 1, "sentencepiece": "AAAA"}, "broken"),
    ],
)
def test_broken_states_are_refused(state: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_state(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the tokenizer stage"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(("kind", "size"), [("syllable", 100), ("bpe", 2)])
def test_wrong_settings_are_refused(kind: str, size: int) -> None:
    with pytest.raises(ValueError):
        TokenizerConfig(kind, size)


def test_word_end_puts_a_token_behind_every_word() -> None:
    tokenizer = Tokenizer.train(["NO YES", "YES"], TokenizerConfig("word_end"))
    assert tokenizer.symbols == ["<blk>", "\u2581", "NO", "YES"]
    assert tokenizer.encode("YES YES NO") == [3, 1, 3, 1, 2, 1]
    assert tokenizer.decode([3, 1, 3, 1, 2]) == tokenizer.decode([3, 1, 3, 1, 2, 1]) == "YES YES NO"
    with pytest.raises(UnknownToken, match="'MAYBE'"):
        tokenizer.encode("YES MAYBE")
    assert Tokenizer.from_state(tokenizer.to_state()) == tokenizer


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "byte_bpe"])
def test_spelling_gives_the_same_text_in_characters(kind: str) -> None:
    size = 262 if kind == "byte_bpe" else 40
    made = Tokenizer.train(TEXTS, TokenizerConfig(kind=kind, vocab_size=size))  # type: ignore[arg-type]
    spelling = made.spelling()
    assert len(spelling) == made.vocab_size and spelling[0] == []
    for text in TEXTS:
        letters = [letter for token in made.encode(text) for letter in spelling[token]]
        assert made.decode(letters) == made.decode(made.encode(text))
        assert all(len(made.symbols[letter]) == 1 for letter in letters)


@pytest.mark.parametrize("kind", ["word", "word_end"])
def test_whole_words_have_no_spelling(kind: str) -> None:
    with pytest.raises(UserError, match="tokenizer.kind=word"):
        Tokenizer.train(TEXTS, TokenizerConfig(kind=kind)).spelling()  # type: ignore[arg-type]
