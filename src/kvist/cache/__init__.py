"""The cache: layout x codec x retention, three independent choices behind one protocol."""

from kvist.cache.batch import Batch
from kvist.cache.codecs import CODECS, make_codec
from kvist.cache.layouts import LAYOUTS, make_cache
from kvist.cache.protocol import KV, Cache, Codec, KVCache

__all__ = [
    "CODECS",
    "KV",
    "LAYOUTS",
    "Batch",
    "Cache",
    "Codec",
    "KVCache",
    "make_cache",
    "make_codec",
]
