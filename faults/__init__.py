"""Faults on a real federation: SuperLink, SuperNodes and apps as processes, gRPC, TLS, node keys. ``make faults``."""
