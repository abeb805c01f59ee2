"""Running and comparing: the command line, configurations, federations in one process."""
