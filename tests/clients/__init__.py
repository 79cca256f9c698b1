"""Programs that people have, as processes of their own against the real server.

`with_NAME.py` drives one client and is run where that client is installed: it knows the client and the
standard library, and nothing of this project. `scripts/test-clients` makes an environment for each;
tests/e2e/test_clients.py runs those that the tests' own environment has.
"""
