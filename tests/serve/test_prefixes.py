"""Which pages are kept, found and given away."""

import hypothesis.strategies as st
from hypothesis import given

from spotlight_jax.serve.prefixes import PrefixStore


def keep(store, prompt, kind=0):
    """All chunks of a prompt that find a page, as a prefill would; what is in each page."""
    hashes = store.hashes(prompt, kind)
    found = len(store.find(hashes, len(prompt)))
    return {place: store.claim(hashes, place) for place in range(found, len(hashes))}


def found(store, prompt, kind=0):
    return store.find(store.hashes(prompt, kind), len(prompt))


def test_a_prompt_finds_the_pages_of_its_beginning_and_keeps_one_token_for_itself():
    store = PrefixStore(pages=8, chunk=4)
    kept = keep(store, range(12))
    assert sorted(kept.values()) == sorted(set(kept.values())) and len(store) == 3
    assert found(store, range(13)) == [kept[0], kept[1], kept[2]]
    assert found(store, range(12)) == [kept[0], kept[1]]  # a token must be left to compute
    assert found(store, [*range(8), 99, 98, 97, 96, 95]) == [kept[0], kept[1]]
    assert found(store, [99, *range(1, 12)]) == []
    assert found(store, range(13), kind=1) == []  # other numbers for the same tokens


def test_what_was_not_used_for_longest_goes_first_and_of_a_prompt_its_end():
    store = PrefixStore(pages=4, chunk=2)
    keep(store, [1, 1, 2, 2, 0])
    keep(store, [3, 3, 4, 4, 0])
    assert len(found(store, [1, 1, 2, 2, 0])) == 2  # used again
    keep(store, [5, 5, 0])
    assert len(found(store, [3, 3, 4, 4, 0])) == 1
    assert len(found(store, [1, 1, 2, 2, 0])) == 2 and len(store) == 4


def test_a_prompt_longer_than_all_pages_keeps_its_beginning():
    store = PrefixStore(pages=3, chunk=2)
    kept = keep(store, range(20))
    assert [place for place, page in kept.items() if page is not None] == [0, 1, 2]
    assert len(found(store, range(20))) == 3


def test_without_pages_nothing_is_kept():
    store = PrefixStore(pages=0, chunk=2)
    assert set(keep(store, range(9)).values()) == {None} and found(store, range(9)) == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), max_size=25), st.integers(0, 6))
def test_a_page_holds_what_its_finder_expects(prompts, pages):
    """Against a plain record of what was written where: every page found holds the tokens up to its end."""
    store, held = PrefixStore(pages, chunk=2), {}
    for prompt in prompts:
        hashes = store.hashes(prompt, 0)
        known = store.find(hashes, len(prompt))
        for place, page in enumerate(known):
            assert held[page] == prompt[: 2 * place + 2]
        assert 2 * len(known) < len(prompt)
        for place in range(len(known), len(hashes)):
            page = store.claim(hashes, place)
            if page is not None:
                held[page] = prompt[: 2 * place + 2]
        assert len(store) <= pages
    for prompt in prompts:  # nothing in use is lost: pages are in use or free
        assert all(held[page] == prompt[: 2 * place + 2] for place, page in enumerate(found(store, prompt)))
