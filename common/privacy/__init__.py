"""The privacy room: accounting, plan, ledger and mechanism. All claims rest on what is in here."""
