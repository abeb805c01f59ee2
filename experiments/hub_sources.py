"""Fetch what a command names as ``hub:NAME``, before any process of its run begins: those read the cache alone."""

from __future__ import annotations

from collections.abc import Mapping

from fedveil.common.config.flat import Scalar
from fedveil.common.hub import HUB, name_sources
from fedveil.common.model.files import fetch
from fedveil.common.tasks.table_files import read_hub

MODEL, DATA = "model.name", ("data.name", "data.test")


def fetched(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return a command's own settings once what they name of a hub is on this machine.

    A model's name stands in them without ``hub:``, as it does wherever the model is read later.

    Raises:
        ModelNotLoaded, DataError: the hub does not give it.
    """
    sources = [str(settings[key]) for key in DATA if str(settings.get(key, "")).startswith(HUB)]
    name_sources(sources)
    for source in sources:
        read_hub(source)
    model = str(settings.get(MODEL, ""))
    return {**settings, MODEL: fetch(model)} if model.startswith(HUB) else dict(settings)
