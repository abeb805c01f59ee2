"""Work on one machine: simulated federations, sweeps, tuning, planning, and the use of finished runs."""
