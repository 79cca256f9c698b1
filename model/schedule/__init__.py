"""Which rows run in the next pass and what a pass means for each sequence, in pure Python."""
