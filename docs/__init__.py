"""The documents; ``docs.make`` writes those that are made from the code."""
