"""The problems that executors get: descriptions, strategies that draw them, and their numbers."""
