"""SST-2: sentences of film reviews and parts of them, positive or negative (Socher et al. 2013).

In the form of GLUE (Wang et al. 2019). The sentences are those of Rotten Tomatoes.
"""

from __future__ import annotations

from fedveil.common.data import phrases
from fedveil.common.data.named import NamedDataset, UserFile

SPLITS = {"sst2": "train", "sst2-dev": "dev", "sst2-test": "test"}


def _split(name: str) -> NamedDataset:
    return NamedDataset(
        name=name,
        file=UserFile(f"data/sst2/{SPLITS[name]}.tsv", "`python -m fedveil.demo.convert sst2 FOLDER` writes"),
        task="classification",
        fields={"text": "{text}"},
        label="label",
        labels={"0": "negative", "1": "positive"},
        label_phrases=phrases.SENTIMENT,
        shares_sentences_with=("rotten-tomatoes", *(other for other in SPLITS if other != name)),
    )


SST2, SST2_DEV, SST2_TEST = (_split(name) for name in SPLITS)
