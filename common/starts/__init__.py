"""Starts: where the factors of an adapter begin, and what that costs."""
