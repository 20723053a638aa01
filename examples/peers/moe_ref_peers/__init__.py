"""Adapters of public implementations to moe-ref's executors, and what comes of the suite turned on them.

Each module imports its peer, and nothing else imports that module: what is not installed is unavailable, and says so.
"""
