"""The fault: a site's worker that does not look whose a task is."""

from __future__ import annotations

import sys
from unittest.mock import patch

from fedveil.client import worker

if __name__ == "__main__":
    with patch.object(worker, "check_task"):
        sys.exit(worker.main())
