"""Messages between server and sites: adapter states, a round's tasks and replies, and their encoding."""
