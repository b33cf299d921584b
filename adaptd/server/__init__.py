"""The HTTP surface: OpenAI-compatible routes, health, metrics, status, administration and the dashboard."""
