"""What `speed inspect` says of a model: facts of its files, and how good each loop is."""
