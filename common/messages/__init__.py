"""Messages between server and sites: adapter states, what is said in a round, and its encoding."""
