"""Attacks on the promise, run against the real code: kills, two processes at once, canaries. ``make audit``."""

from fedveil.common.threads import begin_process

begin_process()
