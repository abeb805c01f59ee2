"""A ledger that outlives runs lies on a disk of its own machine, or is refused before anything is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedveil.client.ledger import mounts
from fedveil.client.node import ledger_of
from fedveil.client.site import open_site
from fedveil.common.errors import LedgerError
from fedveil.experiments.api.sites import same_records
from fedveil.strategies.job import configure

REMOTE = (
    "nfs4",
    "nfs",
    "cifs",
    "smb3",
    "ceph",
    "lustre",
    "9p",
    "fuse.sshfs",
    "fuse.glusterfs",
    "fuse.unheard-of",
    "fuse",
)
LOCAL = ("ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", "virtiofs", "fuseblk", "fuse.gocryptfs")


def mounted(monkeypatch: pytest.MonkeyPatch, table: Path, kind: str, place: Path) -> Path:
    """Write a table in which ``place`` is a mount of ``kind``, above it a local disk, and return a ledger below it."""
    device = os.stat(place).st_dev
    number, name = f"{os.major(device)}:{os.minor(device)}", str(place).replace(" ", r"\040")
    lines = ["21 1 0:1 / / rw - ext4 /dev/sda rw", f"22 21 {number} / {name} rw shared:1 - {kind} far:/x rw,vers=4.2"]
    table.write_text("\n".join([*lines, ""]))
    monkeypatch.setattr(mounts, "MOUNTS", table)
    return place / "new" / "ledger.sqlite"


def check_that_a_remote_ledger_is_refused(ledger: Path, kind: str) -> None:
    config = configure({"data.name": "rotten-tomatoes"}).config
    for ask in (
        lambda: ledger_of({"ledger": str(ledger)}),
        lambda: open_site(
            {"ledger": str(ledger), "partition-id": 0, "num-partitions": 2}, config, "1", simulated=False
        ),
        lambda: same_records(ledger.parent, config, ["clinic"]),
    ):
        with pytest.raises(LedgerError, match=rf"network file system \({kind}\).* move it to a local disk") as refusal:
            ask()
        assert "\n" not in str(refusal.value)
    assert not ledger.parent.exists(), "something was made there"


@pytest.mark.parametrize("kind", REMOTE)
def test_a_ledger_on_a_network_file_system_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_a_remote_ledger_is_refused(mounted(monkeypatch, tmp_path / "table", kind, tmp_path), kind)


def test_a_ledger_that_lies_anywhere_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = mounted(monkeypatch, tmp_path / "table", "nfs4", tmp_path)
    monkeypatch.setattr(mounts, "is_network", lambda _: False)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_that_a_remote_ledger_is_refused(ledger, "nfs4")


@pytest.mark.parametrize("kind", LOCAL)
def test_a_local_disk_is_none_of_a_network(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = mounted(monkeypatch, tmp_path / "table", kind, tmp_path)
    assert ledger_of({"ledger": str(ledger)}) == ledger


def test_a_link_is_followed_to_where_the_ledger_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a place").mkdir()
    ledger = mounted(monkeypatch, tmp_path / "table", "cifs", tmp_path / "a place")
    (tmp_path / "link").symlink_to(ledger.parent)
    with pytest.raises(LedgerError, match=r"\(cifs\)"):
        ledger_of({"ledger": str(tmp_path / "link" / "ledger.sqlite")})


def test_a_subvolume_is_of_the_mount_above_it_and_what_the_kernel_hides_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table"
    ledger, name = tmp_path / "ledger.sqlite", str(tmp_path)
    monkeypatch.setattr(mounts, "MOUNTS", table)
    table.write_text(f"1 0 0:1 / / rw - ext4 d rw\n2 1 0:2 / {name} rw - nfs x rw\n3 1 0:3 / {name} rw - btrfs y rw\n")
    assert mounts.kind_of(ledger) == "btrfs", "of two mounts at one place the later one counts"
    for text in ("", "2 1 0:2 / /elsewhere rw - ext4 d rw\n"):
        table.write_text(text)
        with pytest.raises(LedgerError, match="says nothing"):
            ledger_of({"ledger": str(ledger)})
    table.unlink()
    with pytest.raises(LedgerError, match="says nothing"):
        ledger_of({"ledger": str(ledger)})


def test_this_machine_says_where_its_files_lie(tmp_path: Path) -> None:
    assert mounts.kind_of(tmp_path / "ledger.sqlite")
    assert mounts.kind_of(Path("/proc/self/status")) == "proc"
