"""Settings, data, models, adapters, tasks, messages: shared by server, sites and strategies. Imports none of these."""

from fedveil.common.quiet import leave_out

leave_out()  # here, because whoever imports those packages has imported this one before
