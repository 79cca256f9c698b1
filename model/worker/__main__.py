"""`python -m model.worker DESCRIPTOR`: the engine's process. The descriptor is its socket to the server."""

from model.worker.main import main

main()
