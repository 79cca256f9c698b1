"""The pass made of torch modules, for any device."""
