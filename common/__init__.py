"""Shared words, shapes and rules. Imports nothing of ``strategies``, ``client``, ``server``."""

from fedveil.common.quiet import leave_out

leave_out()  # here, because whoever imports those packages has imported this one before
