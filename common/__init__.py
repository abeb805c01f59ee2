"""Settings, data, models, adapters, tasks, messages: shared by server, sites and strategies. Imports none of these."""

from fedveil.common.hub import close
from fedveil.common.quiet import leave_out

# Here, because whoever imports other packages has imported this one before.
close()
leave_out()
