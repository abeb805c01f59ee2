"""A lying server gets nothing, and the old behaviour behind each of its lies is found; small forms of the audit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from audits.faults import SOUND, Fault
from audits.hostile_bundle import BUNDLES, DEAR, EAGER, SUBMITTED, audit_bundle, audit_dear_bundles, audit_submitted
from audits.hostile_models import UNCOMPARED, UNREHEARSED, audit_files, audit_models
from audits.hostile_records import APART, COLUMNS, DIVISIONS, ROWS, audit_records
from audits.hostile_server import FORGOTTEN, UNPAID, audit_rounds
from audits.hostile_state import BEHIND_CHARGE, UNCHECKED, audit_masks
from audits.planted_rows import PUBLIC, TAKEN, audit_claimed_data, audit_claimed_name
from fedveil.common.findings import Finding

pytestmark = pytest.mark.rough_prices

Audit = Callable[[Path, Fault], Finding]
CASES: dict[Audit, tuple[Fault, ...]] = {
    audit_records: (ROWS, COLUMNS, APART, DIVISIONS),
    audit_models: (UNREHEARSED,),
    audit_files: (UNCOMPARED,),
    audit_bundle: (BUNDLES,),
    audit_dear_bundles: (DEAR, EAGER),
    audit_submitted: (SUBMITTED,),
    audit_claimed_name: (TAKEN,),
    audit_claimed_data: (PUBLIC,),
    audit_rounds: (UNPAID, FORGOTTEN),
    audit_masks: (UNCHECKED, BEHIND_CHARGE),
}


@pytest.mark.parametrize(
    ("audit", "fault"),
    [(audit, fault) for audit, faults in CASES.items() for fault in (SOUND, *faults)],
    ids=lambda value: value.name or "as it is" if isinstance(value, Fault) else value.__name__,
)
def test_a_lie_is_refused_and_the_fault_behind_it_is_found(audit: Audit, fault: Fault, tmp_path: Path) -> None:
    finding = audit(tmp_path, fault)
    assert finding.passed, finding
