from __future__ import annotations

from typing import Any

import pytest

from asr.config import from_dict
from asr.decoding.normalise import ScoringConfig, normalise
from asr.errors import UserError


@pytest.mark.parametrize(("config", "text", "expected"), [
    (ScoringConfig(), "  A b,  c\n", "A b, c"),
    (ScoringConfig(case="lower"), "Straße GO", "straße go"),
    (ScoringConfig(case="upper"), "don't", "DON'T"),
    (ScoringConfig(unicode="NFC"), "e\u0301", "\u00e9"),
    (ScoringConfig(unicode="NFKC"), "\uff21\uff11\u3000x", "A1 x"),
    (ScoringConfig(remove_punctuation=True), "Well, don't - stop! \u4f60\u597d\u3002", "Well don't stop \u4f60\u597d"),
    (ScoringConfig(remove_punctuation=True), "'tis twenty-one... 3.5 a,b", "tis twenty-one 3 5 a b"),
    (ScoringConfig(remove_punctuation=True), "cafe\u0301's, \u0939\u093f-\u0939", "cafe\u0301's \u0939\u093f-\u0939"),
    (ScoringConfig(remove_words=["UH", "UM"]), "UH SO UM UHM", "SO UHM"),
    (ScoringConfig(case="upper", remove_punctuation=True, remove_words=["UH"]), "uh, so.", "SO"),
])  # fmt: skip
def test_texts_are_compared_so(config: ScoringConfig, text: str, expected: str) -> None:
    assert normalise(text, config) == expected
    assert normalise(expected, config) == expected


def test_what_is_done_is_said() -> None:
    assert str(ScoringConfig()) == "as they are"
    config = from_dict({"scoring": {"case": "lower", "unicode": "NFKC", "remove_words": ["uh"]}}).scoring
    assert str(config) == "all in lower case, Unicode NFKC, without the words uh"
    assert str(ScoringConfig(remove_punctuation=True)) == "without punctuation"


@pytest.mark.parametrize(("settings", "message"), [
    ({"case": "upper", "remove_words": ["UM", "uh"]}, "remove_words has 'uh', which .*; write 'UH'"),
    ({"remove_punctuation": True, "remove_words": ["uh,"]}, "write 'uh'"),
    ({"remove_words": ["you know"]}, "name single words"),
    ({"remove_words": [""]}, "name single words"),
])  # fmt: skip
def test_words_that_no_text_has_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict({"scoring": settings})
