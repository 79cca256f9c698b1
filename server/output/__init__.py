"""What a model writes, taken apart: thoughts, calls of tools, the answer. No HTTP, no tokens, no frames."""
