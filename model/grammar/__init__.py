"""What a text must match: whether a grammar compiles, where a sequence stands in it, what waits for it."""
