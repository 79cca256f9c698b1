"""How the choices of an answer look in JSON: one module per endpoint, nothing about time or transport."""
