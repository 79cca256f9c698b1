"""The engine in a process of its own: `EngineProcess` starts it, talks to it and replaces it.

Importing this package imports no torch. `python -m model.worker` is the process; only
`EngineProcess` starts it.
"""

from model.worker.messages import Events
from model.worker.patience import Patience
from model.worker.supervisor import EngineProcess

__all__ = ["EngineProcess", "Events", "Patience"]
