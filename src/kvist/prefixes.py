"""Prefixes that survive a restart: write a cached prefix of an engine to a file, read it back.

A long system prompt is computed once and exported; an engine that imports it answers the first
request behind it as if it had just served one. The file names the model, the codec and the tokens,
and is refused where they differ.
"""

from collections.abc import Sequence
from pathlib import Path

from kvist.cache.prefix_file import open_prefix, save_prefix
from kvist.core.blocks import PagedBlockManager
from kvist.core.prefix import Namespace, PrefixKeys, PrefixMatch
from kvist.engine import Engine
from kvist.errors import CacheError, KvistError

_KEY = -1  # the engine's own sequences count from 0


def export_prefix(
    engine: Engine, token_ids: Sequence[int], path: Path, *, cache_salt: str = ""
) -> int:
    """Write the longest cached prefix of some tokens to a file.

    Args:
        engine: idle.
        token_ids: for example a system prompt that has just been served.
        path: a file that is there is replaced, atomically.
        cache_salt: of the requests that computed it.

    Returns:
        How many tokens the file holds: whole blocks only.

    Raises:
        CacheError: nothing of it is cached, or the file cannot be written.
    """
    blocks = _idle_blocks(engine)
    keys = _keys(engine, token_ids, cache_salt)
    match = blocks.match(keys, len(keys.prompt_ids))
    if not match.num_tokens:
        raise CacheError(
            f"no block of these {len(token_ids)} tokens is cached; serve a request that begins "
            "with them first"
        )
    if not blocks.open(_KEY, keys, match, match.num_tokens):
        raise CacheError("the pool has no room to bring the prefix back from the host tier")
    try:
        engine.move_blocks()
        tables = [blocks.blocks_of(_KEY, g) for g in range(len(blocks.groups))]
        ids = keys.prompt_ids[: match.num_tokens]
        save_prefix(path, engine.pool, tables, ids, model=engine.model.fingerprint)
    finally:
        blocks.free(_KEY)
    return match.num_tokens


def import_prefix(engine: Engine, path: Path, *, cache_salt: str = "") -> int:
    """Read a prefix into an engine's cache, where later requests find it.

    Args:
        engine: idle.
        path: what `export_prefix` wrote.
        cache_salt: of the requests that may find it.

    Returns:
        How many tokens are cached now.

    Raises:
        CacheError: the file is damaged, belongs to another model or codec, or does not fit.
    """
    blocks = _idle_blocks(engine)
    file = open_prefix(path, engine.pool, model=engine.model.fingerprint)
    usable = len(file.token_ids) // blocks.block_size * blocks.block_size
    keys = _keys(engine, file.token_ids, cache_salt)
    if blocks.match(keys, usable).num_tokens == usable:
        return usable
    if not blocks.open(_KEY, keys, PrefixMatch(), len(file.token_ids)):
        raise CacheError(
            f"{path} holds {len(file.token_ids)} tokens, for which the pool has no room; give the "
            "cache more memory"
        )
    try:
        blocks.keep_needed(_KEY, len(file.token_ids))
        file.restore([blocks.blocks_of(_KEY, g) for g in range(len(blocks.groups))])
        blocks.publish(_KEY, len(file.token_ids))
    finally:
        blocks.free(_KEY)
    return usable


def _idle_blocks(engine: Engine) -> PagedBlockManager:
    if engine.has_unfinished:
        raise KvistError("requests are under way; export or import between them")
    return engine.scheduler.blocks


def _keys(engine: Engine, token_ids: Sequence[int], cache_salt: str) -> PrefixKeys:
    namespace = Namespace(engine.scheduler.config.codec, "", cache_salt)
    return PrefixKeys(tuple(token_ids), namespace=namespace)
