"""Randomness as a counter: every uniform is a hash of where it is used, never a stream's state.

The same seed therefore gives the same draw in `generate()`, in the engine and in the server, alone
or batched, and after a preemption. Standard library only; called by the loop and by the scheduler.
"""

import os
from enum import IntEnum

_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a uniform is for; draws for different purposes are independent."""

    SAMPLE = 0
    ACCEPT = 1  # speculation: keep a drafted token?
    RESAMPLE = 2  # speculation: draw from the residual distribution


def uniform(seed: int, sample: int, position: int, purpose: Purpose = Purpose.SAMPLE) -> float:
    """A uniform number in [0, 1) with 53 random bits.

    Args:
        seed: the request's seed, any integer.
        sample: which of the request's n samples.
        position: index of the output token, from 0.
        purpose: what the number decides.
    """
    return uniform_at(sample_key(seed, sample), position, purpose)


def sample_key(seed: int, sample: int) -> int:
    """What all uniforms of one sample have in common: half of the work of each."""
    key = 0x9E3779B97F4A7C15
    for word in (seed & _MASK, (seed >> 64) & _MASK, sample):
        key = _mix((key ^ word) & _MASK)
    return key


def uniform_at(key: int, position: int, purpose: Purpose = Purpose.SAMPLE) -> float:
    """As `uniform`, from a sample's key."""
    state = _mix(_mix((key ^ position) & _MASK) ^ purpose)
    return (state >> 11) / (1 << 53)


def fresh_seed() -> int:
    """A seed from the operating system, for requests that name none."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def _mix(x: int) -> int:
    """Add the golden-ratio increment, then SplitMix64's finaliser (Steele et al., 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
