"""Every exception FedVeil raises on purpose.

::

    FedVeilError
    ├── ConfigError            a setting is unknown, ill-typed or out of range
    ├── DataError              a data file is missing, empty or not what it says
    │   └── UnreadableFile     its rows cannot be separated
    ├── ModelError             a base model cannot be loaded or does not fit the job
    │   └── ModelNotLoaded     it cannot be found or read
    ├── ProtocolError          a message from the other side is not what it claims to be
    │   └── LackingTensors     a task names tensors that this site does not have
    ├── RunFailed              a run cannot go on (too few sites, nothing trained)
    └── PrivacyError           a promise about privacy would not hold
        ├── BudgetExhausted    the next release would exceed the data set's budget
        ├── LedgerError        the ledger cannot be read or written
        ├── PolicyRefusal      a rule of the site's steward forbids it
        └── MechanismError     a gradient did not come from the privacy mechanism

Messages are one line: what is wrong, where, and what to do.
"""

from __future__ import annotations


class FedVeilError(Exception):
    """Base of all errors that are meant to be read by a person."""


class ConfigError(FedVeilError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(FedVeilError):
    """A data file is missing, empty or not what it says it is."""


class UnreadableFile(DataError):
    """The rows of a data file cannot be separated, or it has none."""


class ModelError(FedVeilError):
    """A base model cannot be loaded, or does not fit the job."""


class ModelNotLoaded(ModelError):
    """A base model cannot be found or read."""


class ProtocolError(FedVeilError):
    """A message from the other side is not what it claims to be."""


class LackingTensors(ProtocolError):
    """A task names tensors that this site does not have: lost, of another run, or never sent."""


class RunFailed(FedVeilError):
    """A run cannot go on: too few sites answered, or nothing was trained."""


class PrivacyError(FedVeilError):
    """A promise about privacy would not hold if the program went on."""


class BudgetExhausted(PrivacyError):
    """The next release would exceed the privacy budget of a data set."""


class LedgerError(PrivacyError):
    """The ledger of a site cannot be read or written."""


class PolicyRefusal(PrivacyError):
    """A rule of the site's steward forbids what the server asks for."""


class MechanismError(PrivacyError):
    """A gradient reached the optimiser without passing through the mechanism."""
