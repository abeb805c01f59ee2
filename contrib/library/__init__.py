"""Adapters of finished runs on one basis: a library of them, the choice among them, and what is put together of them.

All of it is computed from what runs have released, and from public words, so it costs nothing: every record keeps the
promise of its own run.
"""
