"""Pairs of sentences: whether the first entails the second (SNLI), whether the second answers the first (QNLI).

Bowman et al. 2015 (CC BY-SA 4.0); Wang et al. 2019, GLUE. Sentence encoders were often trained on SNLI: say so beside
any figure.
"""

from __future__ import annotations

from fedveil.common.data.named import NamedDataset, UserFile


def _split(corpus: str, split: str, ending: str, labels: dict[str, str]) -> NamedDataset:
    def name(which: str) -> str:
        return corpus if which == "train" else f"{corpus}-{which}"

    return NamedDataset(
        name=name(split),
        file=UserFile(f"data/{corpus}/{split}.{ending}", f"`python -m fedveil.demo.convert {corpus} FOLDER` writes"),
        task="classification",
        fields={"text": "{text}", "text_pair": "{text_pair}"},
        label="label",
        labels=labels,
        shares_sentences_with=tuple(name(other) for other in ("train", "dev") if other != split),
    )


INFERENCE = {label: label for label in ("entailment", "neutral", "contradiction")}
ANSWERS = {"entailment": "answer", "not_entailment": "no answer"}

SNLI, SNLI_DEV = (_split("snli", split, "jsonl", INFERENCE) for split in ("train", "dev"))
QNLI, QNLI_DEV = (_split("qnli", split, "tsv", ANSWERS) for split in ("train", "dev"))
