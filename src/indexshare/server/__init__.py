"""The engine over HTTP in the dialects of OpenAI and Anthropic: translation and safety, no policy."""
