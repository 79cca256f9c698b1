"""The HTTP server: OpenAI's API over any `model.protocol.Engine`. Never imports torch."""
