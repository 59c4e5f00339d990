"""Prefix keys are exact: equal only where every token, image, adapter and tenant is."""

import pytest

from kvist.core.prefix import Namespace, PrefixIndex, PrefixKeys
from kvist.core.request import ImageSpan
from kvist.errors import InvariantError


def an_index(max_forgotten: int = 100) -> PrefixIndex:
    return PrefixIndex(block_size=2, num_groups=1, max_forgotten=max_forgotten)


def store(index: PrefixIndex, keys: PrefixKeys, first_block: int = 1) -> None:
    """Give every block of a prompt its bytes."""
    nodes = index.intern(keys, len(keys.prompt_ids) // index.block_size, 0)
    for i, node in enumerate(nodes):
        if not node.num_places:
            index.put_block(node, 0, first_block + i)
    index.check()


def num_known(index: PrefixIndex, keys: PrefixKeys) -> int:
    return len(index.known(keys, len(keys.prompt_ids) // index.block_size))


def test_equal_tokens_behind_another_prefix_are_another_block():
    index = an_index()
    store(index, PrefixKeys((1, 1, 2, 2)))
    assert num_known(index, PrefixKeys((1, 1, 2, 2))) == 2
    assert num_known(index, PrefixKeys((2, 2))) == 0
    assert num_known(index, PrefixKeys((1, 1, 2, 3))) == 1


def test_asking_what_is_known_adds_nothing():
    index = an_index()
    assert num_known(index, PrefixKeys((1, 1, 2, 2))) == 0
    assert len(index) == 0


def test_prompt_and_output_make_one_text():
    keys = PrefixKeys((1, 2, 3), [4, 5, 6])
    assert [keys.tokens(0, 2), keys.tokens(2, 4), keys.tokens(4, 6)] == [(1, 2), (3, 4), (5, 6)]


def test_blocks_under_an_image_are_shared_for_the_same_part_of_the_same_image_only():
    index = an_index()
    tokens = (7, 7, 7, 7)

    def keys(start: int, digest: str) -> PrefixKeys:
        return PrefixKeys(tokens, images=(ImageSpan(start, 2, digest),))

    store(index, keys(0, "cat"))
    assert num_known(index, keys(0, "cat")) == 2
    assert num_known(index, keys(0, "dog")) == 0
    assert num_known(index, keys(1, "cat")) == 0
    assert num_known(index, keys(2, "cat")) == 0
    assert num_known(index, PrefixKeys(tokens)) == 0
    assert keys(2, "dog").extra(0, 2) is None
    assert keys(1, "cat").extra(2, 4) == (("cat", 2, 1),)


@pytest.mark.parametrize(
    "other", [Namespace(salt="b"), Namespace(codec="int8"), Namespace("", "x")]
)
def test_tenants_codecs_and_adapters_share_nothing(other):
    index = an_index()
    store(index, PrefixKeys((1, 2), namespace=Namespace()))
    assert num_known(index, PrefixKeys((1, 2), namespace=other)) == 0
    assert [space for _, space in index.namesakes(PrefixKeys((1, 2), namespace=other))] == [
        Namespace()
    ]


def test_a_serial_number_is_never_given_twice():
    index = an_index(max_forgotten=0)
    store(index, PrefixKeys((1, 2)))
    first = index.known(PrefixKeys((1, 2)), 1)[0]
    index.drop_block(first, 0, step=1)
    assert len(index) == 0, "the node and its root are forgotten"
    store(index, PrefixKeys((1, 2)))
    again = index.known(PrefixKeys((1, 2)), 1)[0]
    assert again.serial > first.serial
    assert not first.alive


def test_a_forgotten_parent_stays_as_long_as_a_child_holds_bytes():
    index = an_index(max_forgotten=0)
    store(index, PrefixKeys((1, 2, 3, 4)))
    parent, child = index.known(PrefixKeys((1, 2, 3, 4)), 2)
    index.drop_block(parent, 0, step=1)
    assert parent.alive
    assert num_known(index, PrefixKeys((1, 2, 3, 4))) == 2
    index.drop_block(child, 0, step=2)
    assert (len(index), child.alive, parent.alive) == (0, False, False)


def test_keys_that_outlive_their_nodes_find_the_new_ones():
    index = an_index(max_forgotten=0)
    keys = PrefixKeys((1, 2, 3, 4))
    store(index, keys)
    for node in reversed(index.known(keys, 2)):
        index.drop_block(node, 0, step=1)
    assert num_known(index, keys) == 0
    store(index, keys)
    assert all(node.alive for node in index.known(keys, 2))


def test_the_youngest_nodes_without_bytes_are_remembered_with_the_step_they_lost_them():
    index = an_index(max_forgotten=2)
    for token in range(4):
        store(index, PrefixKeys((token, token)), first_block=1 + token)
    for token in range(4):
        index.drop_block(index.known(PrefixKeys((token, token)), 1)[0], 0, step=10 + token)
    assert [num_known(index, PrefixKeys((token, token))) for token in range(4)] == [0, 0, 1, 1]
    assert index.known(PrefixKeys((3, 3)), 1)[0].evicted_step == 13


def test_the_closest_continuation_tells_where_a_prompt_parts_from_the_cached_ones():
    index = an_index()
    store(index, PrefixKeys((1, 2, 3, 4)))
    keys = PrefixKeys((1, 2, 3, 9))
    index.known(keys, 2)
    assert index.closest(keys, 1) == 1
    assert index.closest(PrefixKeys((1, 9)), 0) == 1
    assert index.closest(PrefixKeys((1, 9), namespace=Namespace(salt="b")), 0) == -1


def corrupt_places(index: PrefixIndex) -> None:
    next(node for node in index if node.parent).num_places += 1


def corrupt_tokens(index: PrefixIndex) -> None:
    index.put_block(index.intern(PrefixKeys((1, 2, 3, 4, 5)), 3, 0)[2], 0, 9)


def corrupt_key(index: PrefixIndex) -> None:
    next(node for node in index if node.parent).alive = False


def corrupt_parent(index: PrefixIndex) -> None:
    next(node for node in index if node.parent).children.clear()


def corrupt_root(index: PrefixIndex) -> None:
    index._root(Namespace(salt="nobody"))


def corrupt_forgotten(index: PrefixIndex) -> None:
    index._forgotten[next(node for node in index if node.parent)] = None


def corrupt_firsts(index: PrefixIndex) -> None:
    index._firsts.clear()


def corrupt_roots(index: PrefixIndex) -> None:
    index._roots.clear()


def corrupt_dropped(index: PrefixIndex) -> None:
    node = index.intern(PrefixKeys((1, 2, 5, 5)), 2, 0)[1]
    index._drop(node)
    index._forgotten[node] = None


@pytest.mark.parametrize(
    ("corrupt", "said"),
    [
        (corrupt_places, "counts 2 places"),
        (corrupt_tokens, "stands for 1 tokens"),
        (corrupt_key, "wrong key"),
        (corrupt_parent, "lost its parent"),
        (corrupt_root, "has no children"),
        (corrupt_forgotten, "forgotten iff"),
        (corrupt_firsts, "first blocks"),
        (corrupt_roots, "list of roots"),
        (corrupt_dropped, "no longer in the index"),
    ],
)
def test_check_names_what_is_wrong_with_the_index(corrupt, said):
    index = an_index()
    store(index, PrefixKeys((1, 2, 3, 4)))
    corrupt(index)
    with pytest.raises(InvariantError, match=said):
        index.check()
