"""An engine that is many: replicas of one engine behind the same interface as one engine process.

Knows nothing about HTTP. Only `router` imports Ray; `server.cluster` puts the parts together.
"""
