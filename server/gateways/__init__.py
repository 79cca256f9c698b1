"""Requests of other APIs as requests of the chat API, by which they are planned and generated."""
