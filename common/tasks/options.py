"""Multiple choice: a record for each option that a prompt lists, to compare how likely the model finds them.

A prompt lists options as lines, ``A. ...``, ``B. ...`` and so on, and the completion is one of them, letter and words.
The options are read off the tokens of a record on which a model is scored, and of none that is trained on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fedveil.common.tasks.base import IGNORED, Record
from fedveil.common.tasks.text import TOKENS

if TYPE_CHECKING:
    from fedveil.common.model.base import BaseModel

LISTED = re.compile(r"^A\. .*(?:\n[B-Z]\. .*)+", flags=re.MULTILINE)


def options_of(base: BaseModel, record: Record) -> list[Record]:
    """Return a record for each option, the right one first; none where the answer is no option of the prompt.

    The losses of these records, means over the tokens of an option and its end mark, are its negative log-likelihood,
    normalised by its length. All have the same prompt.
    """
    from fedveil.common.model.shapes import longest_within

    tokens, labels, tokenizer = record[TOKENS], record["labels"], base.processor
    begin = len(labels) - next((i for i, label in enumerate(reversed(labels)) if label == IGNORED), len(labels))

    def words_of(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def tokens_of(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)[TOKENS])

    listed, answer = LISTED.findall(words_of(tokens[:begin])), words_of(tokens[begin:])
    right = answer.strip()
    options = [option.strip() for option in listed[-1].split("\n")] if listed else []
    before = answer[: len(answer) - len(answer.lstrip())]
    if right not in options or tokens_of(before + right) != tokens[begin:][: len(tokens_of(before + right))]:
        return []
    end = tokens[begin:][len(tokens_of(before + right)) :]
    answers = [tokens_of(before + option) + end for option in [right, *(one for one in options if one != right)]]
    prompt = tokens[:begin][-max(1, longest_within(base.positions) - max(map(len, answers))) :]
    return [
        {
            TOKENS: prompt + answer_tokens,
            "attention_mask": [1] * (len(prompt) + len(answer_tokens)),
            "labels": [IGNORED] * len(prompt) + answer_tokens,
        }
        for answer_tokens in answers
    ]
