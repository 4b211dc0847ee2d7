"""Which page holds which chunk of which prompt; least recently used pages are given away first."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class PrefixStore:
    """Chunks of prompts by all tokens up to their end, and the page of each.

    A page is found by a keyed hash of every token before it, so that what a page holds is what the same tokens would
    give again, and nobody can make two prompts share a hash.
    """

    def __init__(self, pages: int, chunk: int) -> None:
        """Begin with nothing stored.

        Args:
            pages: how many there are.
            chunk: tokens of each.
        """
        self.pages, self.chunk = pages, chunk
        self._key = os.urandom(32)
        self._free = list(range(pages))
        self._pages: OrderedDict[bytes, int] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        """Return the number of pages in use."""
        return len(self._pages)

    def clear(self) -> None:
        """Forget everything."""
        self._free = list(range(self.pages))
        self._pages.clear()

    def hashes(self, prompt: Sequence[int], kind: int) -> list[bytes]:
        """Return a hash for each whole chunk of a prompt, of all its tokens up to there.

        Args:
            prompt: token ids.
            kind: what else the numbers in a page depend on, such as the set of hash functions.
        """
        state = hashlib.blake2b(kind.to_bytes(8, "little", signed=True), key=self._key, digest_size=32)
        tokens, found = np.asarray(prompt, np.int32), []
        for start in range(0, len(tokens) - self.chunk + 1, self.chunk):
            state.update(tokens[start : start + self.chunk].tobytes())
            found.append(state.digest())
        return found

    def find(self, hashes: Sequence[bytes], tokens: int) -> list[int]:
        """Return pages of the longest beginning kept, so that at least one of the prompt's tokens is left over."""
        found = []
        for place, key in enumerate(hashes):
            if key not in self._pages or (place + 1) * self.chunk >= tokens:
                break
            found.append(key)
        for key in reversed(found):  # a chunk is of no use without those before it: they are given away after it
            self._pages.move_to_end(key)
        return [self._pages[key] for key in found]

    def claim(self, hashes: Sequence[bytes], place: int) -> int | None:
        """Return the page that a prompt's chunk is to be copied to; None where it is kept already, or there is none.

        Args:
            hashes: of the prompt's chunks; no page of theirs is given away for it.
            place: of the chunk among them; those before it are kept, or it would never be found.
        """
        chain = hashes[: place + 1]
        if chain[-1] in self._pages or any(key not in self._pages for key in chain[:-1]):
            return None
        if self._free:
            page = self._free.pop()
        elif (oldest := next(iter(self._pages), None)) is None or oldest in chain:
            return None
        else:
            page = self._pages.pop(oldest)
        self._pages[chain[-1]] = page
        for key in reversed(chain[:-1]):  # of no use without those before it
            self._pages.move_to_end(key)
        return page
