"""What is done to texts before they are compared. It is stated beside each error rate: other rules give other rates."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from asr.decoding.score import Transcribed


@dataclass
class ScoringConfig:
    """What is done to references and to what was heard alike, before they are split at whitespace and compared.

    Args:
        case: keep it, or compare all in lower or upper case.
        unicode: keep characters as they are, or compare composed ones (NFC), or also full-width letters and digits as
            plain ones (NFKC).
        remove_punctuation: put a space in place of what Unicode calls punctuation, but apostrophes and hyphens between
            letters or digits.
        remove_words: leave out these words, as they stand after all this, such as [UH, UM].
    """

    case: Literal["keep", "lower", "upper"] = "keep"
    unicode: Literal["keep", "NFC", "NFKC"] = "keep"
    remove_punctuation: bool = False
    remove_words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        others = replace(self, remove_words=[]) if self.remove_words else self
        for word in self.remove_words:
            stands = normalise(word, others)
            if stands != word or len(word.split()) != 1:
                one = len(stands.split()) == 1
                raise ValueError(
                    f"remove_words has {word!r}, which no text has as a word once the other rules are applied; "
                    + (f"write {stands!r}" if one else "name single words")
                )

    def __str__(self) -> str:
        """In words, for whoever reads an error rate."""
        parts = {
            f"all in {self.case} case": self.case != "keep",
            f"Unicode {self.unicode}": self.unicode != "keep",
            "without punctuation": self.remove_punctuation,
            f"without the words {' '.join(self.remove_words)}": bool(self.remove_words),
        }
        return ", ".join(part for part, done in parts.items() if done) or "as they are"


def normalise(text: str, config: ScoringConfig) -> str:
    """A text as it is compared; words are separated by one space."""
    if config.unicode != "keep":
        text = unicodedata.normalize(config.unicode, text)
    if config.case != "keep":
        text = text.lower() if config.case == "lower" else text.upper()
    if config.remove_punctuation:
        text = "".join(" " if _is_punctuation(text, i) else character for i, character in enumerate(text))
    return " ".join(word for word in text.split() if word not in config.remove_words)


def normalised(results: Iterable[Transcribed], config: ScoringConfig) -> list[Transcribed]:
    """Utterances with their texts as they are compared."""
    return [Transcribed(one.cut_id, normalise(one.ref, config), normalise(one.hyp, config)) for one in results]


def _is_punctuation(text: str, i: int) -> bool:
    if not unicodedata.category(text[i]).startswith("P"):
        return False
    within = 0 < i < len(text) - 1 and _is_of_a_word(text[i - 1]) and _is_of_a_word(text[i + 1])
    return not (within and text[i] in "'’-")


def _is_of_a_word(character: str) -> bool:
    """A letter or digit, or a mark that belongs to one: an accent of its own, a vowel sign."""
    return character.isalnum() or unicodedata.category(character).startswith("M")
