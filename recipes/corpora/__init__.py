"""The corpora of the recipes. A new corpus is one new module and one line in ``CORPORA``."""

from __future__ import annotations

from recipes.corpora import aishell, custom, fsdd, librispeech, synth, yesno
from recipes.corpora.base import Corpus, Prepared

CORPORA: dict[str, Corpus] = {
    yesno.NAME: yesno,
    fsdd.NAME: fsdd,
    synth.NAME: synth,
    librispeech.NAME: librispeech,
    aishell.NAME: aishell,
    custom.NAME: custom,
}

__all__ = ["CORPORA", "Corpus", "Prepared"]
