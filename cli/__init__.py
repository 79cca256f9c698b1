"""The command `speed`: one module for each thing that it does."""
