"""The looped model itself, in plain torch modules: the reference that every backend is held to."""
