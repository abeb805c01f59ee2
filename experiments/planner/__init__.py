"""The planner: what a run will cost in privacy, traffic, time and memory, before it."""
