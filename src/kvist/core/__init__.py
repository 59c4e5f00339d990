"""The engine's brain: requests, blocks, prefixes, retention, scheduler, plan, randomness.

Standard library only: no tensor ever enters this room (a test says so).
"""
