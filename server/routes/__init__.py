"""One module of routes per resource. A route parses, calls one thing and answers; nothing is decided here."""
