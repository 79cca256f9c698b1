"""The HTTP server: OpenAI's API over any `model.protocol.EngineClient`. Never imports torch."""
