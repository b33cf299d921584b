"""Vocabulary in groups, for rejections by token group (paper 1: a draft tuned on math rejects function words on chat)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: Built-in groups in the order in which they are tried; each is an expression of the whole token, spaces around it left out.
RULES: Final[dict[str, str]] = {
    "whitespace": r"",
    "numerals": r"[0-9]+(?:[.,:/][0-9]+)*[.,:%]?",
    "operators": r"[-+*/=<>^%×÷±≤≥≠≈√∑∫·→⇒]+",
    "function words": (
        "a|an|the|this|that|these|those|i|you|he|she|it|we|they|me|him|her|us|them|my|your|his|its|our|their|who|whom|whose|"
        "which|what|and|or|but|nor|so|yet|if|then|than|because|while|when|where|how|why|as|of|in|on|at|by|for|with|about|"
        "into|from|to|up|out|off|over|under|between|through|during|before|after|not|no|is|am|are|was|were|be|been|being|"
        "have|has|had|do|does|did|can|could|will|would|shall|should|may|might|must|there|here|all|any|some|each|both|also|"
        "only|very|more|most|other|such|too|just"
    ),
    "punctuation": r"[.,;:!?'\"()\u2010-\u2027\u00ab\u00bb\u00bf\u00a1\u3001\u3002\u2026]+",
    "code symbols": r"(?=.*[\[\]{}_\\|&~`$#@;()=<>])[\W_]+",
}
#: What no rule takes.
REST: Final = "other"


class TokenGroups:
    """The group of each token, found when it is first asked for.

    Args:
      texts: token ids to the text of each.
      own: expressions by group, tried first, in order; a built-in name replaces its rule.
    """

    def __init__(self, texts: Callable[[Sequence[int]], Sequence[str]], own: Mapping[str, str]) -> None:
        rules = {**own, **{name: rule for name, rule in RULES.items() if name not in own}}
        self.names = (*(name for name in rules if name != REST), REST)
        self.fingerprint = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]
        self.texts = texts
        self._rules = [(i, re.compile(rules[name], re.IGNORECASE)) for i, name in enumerate(self.names[:-1])]
        self._known: dict[int, int] = {}

    def of(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """[N] index into `names` of each token."""
        unique, inverse = np.unique(ids, return_inverse=True)
        new = [int(token) for token in unique if int(token) not in self._known]
        for token, text in zip(new, self.texts(new) if new else (), strict=True):
            self._known[token] = self._group(text)
        found: NDArray[np.int64] = np.array([self._known[int(token)] for token in unique], np.int64)[inverse]
        return found

    def _group(self, text: str) -> int:
        stripped = text.strip()
        if not text:  # a special token, which has no text
            return len(self.names) - 1
        return next((i for i, rule in self._rules if rule.fullmatch(stripped)), len(self.names) - 1)
