"""Every error that kvist raises on purpose, one small family.

The message says what was wrong, with which value, and what to do about it, in one line: the
command line prints that line and nothing else. This module imports nothing, so that every room
of the house may use it.
"""

__all__ = [
    "CacheError",
    "CacheFull",
    "CheckpointError",
    "ConfigError",
    "ContextTooLong",
    "DownloadError",
    "EngineDead",
    "InvariantError",
    "KvistError",
    "MissingDependency",
    "ModelNotFound",
    "NotSupported",
    "NumericalError",
    "RequestError",
    "UnknownLayer",
]


class KvistError(Exception):
    """Something that the user can understand and mend; the base of all others."""


class ConfigError(KvistError):
    """A model's configuration lacks a field or holds a value that makes no sense."""


class NotSupported(KvistError):
    """A named feature that kvist does not run (yet), refused rather than run wrongly."""


class CheckpointError(KvistError):
    """A checkpoint's files are missing, damaged, or do not fit the configuration."""


class ModelNotFound(KvistError):
    """No directory, file, pulled model or hub repository of this name."""


class DownloadError(KvistError):
    """A download failed or did not have the expected checksum; nothing was left behind."""


class MissingDependency(KvistError):
    """An optional package is needed for what was asked; the message says how to install it."""


class RequestError(KvistError):
    """A request was refused before any work was done; no other request is touched."""


class ContextTooLong(RequestError):
    """Prompt plus new tokens exceed what the model or the cache can hold; both numbers given."""


class CacheError(KvistError):
    """A cache was used in a way that its contract forbids."""


class CacheFull(CacheError):
    """A cache of fixed size has no room for a step; `bind` raises it before anything is written."""


class InvariantError(CacheError):
    """The block manager's or the scheduler's books do not add up: a defect; names the invariant."""


class UnknownLayer(CacheError):
    """A layer index that the cache was not made for."""


class NumericalError(KvistError):
    """NaN or infinite logits; the message names the step and the sequence."""


class EngineDead(KvistError):
    """The engine's thread has ended, closed or by an error; it serves no request any more."""
