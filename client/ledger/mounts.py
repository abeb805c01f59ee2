"""The file system below a ledger. One over a network is refused: its locks and syncs are another machine's word."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from fedveil.common.errors import LedgerError

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = frozenset(
    (
        *("9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "kafs", "lustre", "ncp", "ncpfs"),
        *("nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "vboxsf", "vmhgfs", "wekafs"),
    )
)
"""Types in /proc/self/mountinfo whose files another machine keeps."""
LOCAL_FUSE = frozenset(
    ("fuseblk", *(f"fuse.{name}" for name in ("cryfs", "encfs", "exfat", "fuse-overlayfs", "gocryptfs", "ntfs-3g")))
)
"""Types of file systems in user space that lie on this machine's disks; any other one may lie anywhere."""


def refuse_network(path: Path) -> None:
    """Raise LedgerError if a ledger is or would be made on a network file system, or Linux does not say on which."""
    if sys.platform != "linux":
        return
    kind = kind_of(path)
    if kind and not is_network(kind):
        return
    where = f"a network file system ({kind})" if kind else f"a file system of which {MOUNTS} says nothing"
    raise LedgerError(
        f"the ledger {path} lies on {where}, where two processes could spend the same budget: stop what uses it, move "
        "it to a local disk (in a cluster a ReadWriteOnce volume of a block device), and name it as the node's 'ledger'"
    )


def is_network(kind: str) -> bool:
    """Return whether the files of a type of file system may lie on another machine.

    >>> [is_network(kind) for kind in ("ext4", "nfs4", "fuse.sshfs", "fuse", "fuseblk", "overlay")]
    [False, True, True, True, False, False]
    """
    return kind in NETWORK or (kind.startswith("fuse") and kind not in LOCAL_FUSE)


def kind_of(path: Path) -> str:
    """Return the type of the file system that a file is or would be on; empty: the kernel does not say it."""
    file = path.resolve()
    try:
        device = next(filter(None, map(_device, (file, *file.parents))))
        mounts = [_mount(line) for line in MOUNTS.read_text("utf-8", errors="surrogateescape").splitlines()]
    except OSError:
        return ""
    if of_device := [kind for number, _, kind in mounts if number == device]:
        return of_device[0]
    # A subvolume of btrfs has a number that is no mount's. Of two mounts at one place the later one hides the other.
    above = [(len(place.parts), at, kind) for at, (_, place, kind) in enumerate(mounts) if file.is_relative_to(place)]
    return max(above)[2] if above else ""


def _device(path: Path) -> str:
    """Return the number of the device that a file is on, as mountinfo writes it; empty: it is not to be seen."""
    try:
        number = path.stat().st_dev
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"


def _mount(line: str) -> tuple[str, Path, str]:
    """Return the device's number, the place and the type of a line of mountinfo."""
    before, _, after = line.partition(" - ")
    words = before.split(" ")
    return words[2], Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), words[4])), after.split(" ")[0]
