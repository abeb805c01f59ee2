"""Simulated images of textiles: weaves without a fault, with a local one, and with one all over."""

from __future__ import annotations

from fedveil.common.data.named import NamedDataset
from fedveil.demo.packaged import PackagedTree

FILES = PackagedTree(
    distribution="conformal-clip-data",
    version="0.1.4",
    path="conformal_clip_data/data/textile_images/simulated",
    sha256="1a5222aa9fcacd5f62d371d9f90144acfda7c72d9ac60919bd08a33dff965e9f",
)
TEXTILE_IMAGES = NamedDataset(
    name="textile-images",
    file=FILES,
    task="image-classification",
    labels={name: name for name in ("nominal", "local", "global")},
)
