"""Files of a model on disk, and nothing else that reads them: folders, families, weights, their placement."""
