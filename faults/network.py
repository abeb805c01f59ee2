"""A network of its own for one site: a namespace, and a cable to this machine that can be cut. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess

from fedveil.common.errors import RunFailed


class Cable:
    """A pair of virtual interfaces between this machine and a network namespace."""

    def __init__(self) -> None:
        mark = os.getpid() % 0xFFFF
        self._name, self._near, self._far = f"fedveil-{mark:x}", f"fvn{mark:x}", f"fvf{mark:x}"
        block = mark % 0x4000 * 4
        # RFC 2544's addresses for trials: on nobody's network.
        self.address, self._other = (f"198.18.{block // 256}.{block % 256 + host}" for host in (1, 2))
        """This machine's address, as the site dials it."""

    def lay(self) -> None:
        """Make namespace and interfaces.

        Raises:
            RunFailed: this takes root and iproute2, and they are not there.
        """
        if os.geteuid() or not shutil.which("ip"):
            raise RunFailed("needs root and iproute2")
        _ip("netns", "add", self._name)
        _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._name)
        _ip("addr", "add", f"{self.address}/30", "dev", self._near)
        _ip("link", "set", self._near, "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self._other}/30", "dev", self._far),
            ("link", "set", self._far, "up"),
        ):
            _ip("-n", self._name, *words)

    def inside(self, command: list[str]) -> list[str]:
        """Return the command that runs ``command`` in the namespace."""
        return ["ip", "netns", "exec", self._name, *command]

    def cut(self) -> None:
        """Pull the cable: nothing comes through, connections stay open."""
        _ip("link", "set", self._near, "down")

    def heal(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self._near, "up")

    def remove(self) -> None:
        """Take namespace and interfaces away."""
        subprocess.run(["ip", "netns", "del", self._name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"ip {' '.join(words)}: {done.stderr.strip()}")
