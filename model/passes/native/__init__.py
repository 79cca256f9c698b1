"""Passes on a CPU by a C++ library of our own: one call a pass, every row's bits its own.

`build` compiles it, `library` loads it, `structs` mirrors its interface, `weights` packs a model for it and
`backend` runs passes. Nothing outside of this package knows how numbers are laid out.
"""
