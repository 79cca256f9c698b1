"""`python -m server`: the same as `speed serve`."""

import sys

from server.command import main

sys.exit(main())
