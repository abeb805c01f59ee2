"""The front door in Python: what ``import fedveil`` offers (``fedveil.run``, ``plan``, ``load``, ``Run``)."""

import warnings

# Of tqdm, which comes along: without ipywidgets it falls back to text, and no bar of its is shown here.
warnings.filterwarnings("ignore", "IProgress not found")
