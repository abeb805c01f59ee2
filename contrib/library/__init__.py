"""Adapters of finished runs on one basis: a library of them, and what is put together of them, at no price."""
