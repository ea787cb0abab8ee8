"""Recognizes the language of an answer: by its script, and among languages in Latin script by their function words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping

_FUNCTION_WORDS = {
    "English": "the of and to is that it was for on are as with his they this have from not by but what all were we when your can "
    "there an each which their if will you i he she be in a at or has had my our because",
    "German": "der die das und ist ich nicht ein eine einen einem zu den von mit sich des auf für im dem als auch es an werden aus "
    "er hat dass sie nach wird bei wir du mein meine dein ihr war sind oder sehr wie kann",
    "French": "le la les de des et est un une je ne pas que qui dans ce il elle pour sur avec au aux du en sont plus nous vous mon "
    "ma mes son sa ses cette été ou très se par mais l d j c",
    "Spanish": "el la los las de y que en un una es no se por con para su al lo como más pero sus le ya o este sí porque esta son "
    "muy mi yo del está hay también me te tu nos",
    "Italian": "il lo la i gli le di e che è un una in per non con del della dei sono mi ti si anche come più ma io da al nel nella "
    "molto ho questo questa mio mia suo perché alla dal",
    "Portuguese": "o a os as de e que em um uma é não se por com para do da dos das no na mais como mas ao eu você ele ela muito meu "
    "minha são foi está também seu sua pelo isso",
    "Dutch": "de het een en van is ik te dat die in niet zijn op aan met voor er maar om hij ze wij je mijn ook als dan naar bij "
    "heeft was worden door uit nog wel zeer",
}
FUNCTION_WORDS: Mapping[str, frozenset[str]] = {
    name: frozenset(text.split()) for name, text in _FUNCTION_WORDS.items()
}
SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "Russian": ("CYRILLIC",),
    "Greek": ("GREEK",),
    "Chinese": ("CJK",),
    "Japanese": ("HIRAGANA", "KATAKANA", "CJK"),
    "Korean": ("HANGUL",),
    "Arabic": ("ARABIC",),
    "Hebrew": ("HEBREW",),
    "Hindi": ("DEVANAGARI",),
}
"""Beginnings of the Unicode names of a language's letters."""
LANGUAGES = (*FUNCTION_WORDS, *SCRIPTS)
SCRIPT_SHARE = 0.5
"""Smallest share of letters in a language's script: an answer may hold names in Latin script."""


def is_in_language(text: str, language: str) -> bool:
    """Whether most of a text is in one of `LANGUAGES`.  A text without letters is in none."""
    letters = [unicodedata.name(c, "") for c in text if c.isalpha()]
    if not letters:
        return False
    if language in SCRIPTS:
        share = sum(name.startswith(SCRIPTS[language]) for name in letters) / len(letters)
        kana = any(name.startswith(("HIRAGANA", "KATAKANA")) for name in letters)
        return share >= SCRIPT_SHARE and (language not in ("Chinese", "Japanese") or kana == (language == "Japanese"))
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    counts = {name: sum(words[word] for word in known) for name, known in FUNCTION_WORDS.items()}
    return counts[language] > 0 and counts[language] == max(counts.values())
