"""The front door in Python: what ``import fedveil`` offers (``fedveil.run``, ``plan``, ``load``, ``Run``)."""
