"""Which page to give up: paging, with one predicted bit a page (1 = discard, 0 = keep).

An order knows the pages that may be given up and chooses the next. Three of them:

    Lru      the page unused for longest
    Discard  a page whose bit says discard, else as Lru
    Phase    MARK&PREDICT: of the pages not requested in this phase a random one whose bit says discard, else a random
             one. A phase ends when every page was requested in it

After Paging with Succinct Predictions (arXiv 2210.02775). With k pages, and eta0 wrong keeps and eta1 wrong discards
against the offline optimum OPT, Discard misses at most OPT + (k - 1) eta0 + eta1 times: it is the paper's deterministic
algorithm, with the flush of the whole cache that ends a phase without discards replaced by the order of LRU. Phase
misses O(log k) OPT in the mean, whatever the bits are, and is within a factor of 2 of OPT if they are right.

`Paging` is a cache of equal pages over an order: the setting of those proofs, and the ghost of a real cache. The block
pool drives the same orders, where pages are the blocks of hash chains. There a page is *covered* while a page that
continues it may be given up before it; an order never chooses a covered page.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

P = TypeVar("P", bound=Hashable)


class Order(Protocol[P]):
    """The pages that may be given up. Every operation is O(1), amortised."""

    def __len__(self) -> int: ...

    def add(self, page: P, bit: int, *, covered: bool = False) -> None:
        """A page that was requested just now. No page that continues it may have been requested later."""

    def remove(self, page: P) -> None:
        """The page is requested, or is gone."""

    def touch(self, page: P) -> None:
        """As if the page were requested now; it stays where it may be given up."""

    def cover(self, page: P) -> None:
        """Not to be given up before what continues it."""

    def uncover(self, page: P) -> None: ...

    def predict(self, page: P, bit: int) -> None:
        """A later prediction of the page's bit."""

    def victim(self) -> P:
        """Take out the page to give up next. KeyError when there is none."""

    def oldest(self) -> P:
        """Take out the page unused for longest, whatever was predicted. KeyError when there is none."""

    def check(self, covered: dict[P, bool]) -> None:
        """Raise RuntimeError unless exactly these pages are here, covered or not as told."""


class Lru(Generic[P]):
    """Least recently used first.

    Who continues a page has used it too, so a page is at least as young as what continues it: the oldest page is never
    covered, and covers need no attention here.
    """

    def __init__(self) -> None:
        self._pages: OrderedDict[P, None] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._pages)

    def add(self, page: P, bit: int, *, covered: bool = False) -> None:
        self._pages[page] = None

    def remove(self, page: P) -> None:
        del self._pages[page]

    def touch(self, page: P) -> None:
        self._pages.move_to_end(page)

    def cover(self, page: P) -> None:
        pass

    def uncover(self, page: P) -> None:
        pass

    def predict(self, page: P, bit: int) -> None:
        pass

    def victim(self) -> P:
        return self.oldest()

    def oldest(self) -> P:
        page = next(iter(self._pages))
        self.remove(page)
        return page

    def check(self, covered: dict[P, bool]) -> None:
        if self._pages.keys() != covered.keys():
            raise RuntimeError(f"the eviction order has {len(self._pages)} pages, {len(covered)} may be given up")
        oldest = next(iter(self._pages), None)
        if oldest is not None and covered[oldest]:
            raise RuntimeError(f"the oldest page {oldest!r} is covered")


class Discard(Lru[P]):
    """First what is predicted to be of no use, then least recently used."""

    def __init__(self) -> None:
        super().__init__()
        self._covered: set[P] = set()
        self._bits: dict[P, int] = {}
        self._discards: OrderedDict[P, None] = OrderedDict()  # bit 1 and not covered, oldest first

    def add(self, page: P, bit: int, *, covered: bool = False) -> None:
        super().add(page, bit)
        self._bits[page] = bit
        if covered:
            self._covered.add(page)
        elif bit:
            self._discards[page] = None

    def remove(self, page: P) -> None:
        super().remove(page)
        del self._bits[page]
        self._covered.discard(page)
        self._discards.pop(page, None)

    def touch(self, page: P) -> None:
        super().touch(page)
        if page in self._discards:
            self._discards.move_to_end(page)

    def cover(self, page: P) -> None:
        self._covered.add(page)
        self._discards.pop(page, None)

    def uncover(self, page: P) -> None:
        self._covered.remove(page)
        if self._bits[page]:
            self._discards[page] = None
            self._discards.move_to_end(page, last=False)  # it is hardly younger than what continued it

    def predict(self, page: P, bit: int) -> None:
        if bit == self._bits[page]:
            return
        self._bits[page] = bit
        if not bit:
            self._discards.pop(page, None)
        elif page not in self._covered:
            self._discards[page] = None

    def victim(self) -> P:
        for page in self._discards:
            self.remove(page)
            return page
        return self.oldest()

    def check(self, covered: dict[P, bool]) -> None:
        super().check(covered)
        if self._covered != {page for page in covered if covered[page]}:
            raise RuntimeError("the eviction order covers other pages than those that are continued")
        if self._discards.keys() != {page for page, bit in self._bits.items() if bit and not covered[page]}:
            raise RuntimeError("the pages to discard are not those whose bit says so")


class Bag(Generic[P]):
    """A set with a random choice in O(1)."""

    def __init__(self) -> None:
        self._items: list[P] = []
        self._place: dict[P, int] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: P) -> bool:
        return item in self._place

    def add(self, item: P) -> None:
        self._place[item] = len(self._items)
        self._items.append(item)

    def remove(self, item: P) -> None:
        place, last = self._place.pop(item), self._items.pop()
        if last != item:
            self._items[place] = last
            self._place[last] = place

    def choose(self, source: random.Random) -> P:
        return self._items[int(source.random() * len(self._items))]


class Phase(Lru[P]):
    """First what was not requested in this phase and is predicted not to be in the next, then what was not requested.

    Pages that are not covered lie in four bags, by mark and bit. A mark is the number of the phase it was set in, so
    that a new phase takes all marks back at once.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._phase = 0
        self._states: dict[P, tuple[int, int]] = {}  # (phase of the mark, bit)
        self._covered: set[P] = set()
        self._marked: tuple[Bag[P], Bag[P]] = (Bag(), Bag())  # by bit
        self._unmarked: tuple[Bag[P], Bag[P]] = (Bag(), Bag())

    def _bag(self, page: P) -> Bag[P]:
        mark, bit = self._states[page]
        return (self._marked if mark == self._phase else self._unmarked)[bit]

    def add(self, page: P, bit: int, *, covered: bool = False) -> None:
        super().add(page, bit)
        self._states[page] = self._phase, bit
        if covered:
            self._covered.add(page)
        else:
            self._bag(page).add(page)

    def remove(self, page: P) -> None:
        super().remove(page)
        if page in self._covered:
            self._covered.remove(page)
        else:
            self._bag(page).remove(page)
        del self._states[page]

    def touch(self, page: P) -> None:
        bit, covered = self._states[page][1], page in self._covered
        self.remove(page)
        self.add(page, bit, covered=covered)

    def cover(self, page: P) -> None:
        self._bag(page).remove(page)
        self._covered.add(page)

    def uncover(self, page: P) -> None:
        self._covered.remove(page)
        self._bag(page).add(page)

    def predict(self, page: P, bit: int) -> None:
        mark, before = self._states[page]
        if bit == before:
            return
        if page in self._covered:
            self._states[page] = mark, bit
        else:
            self._bag(page).remove(page)
            self._states[page] = mark, bit
            self._bag(page).add(page)

    def victim(self) -> P:
        if not self._unmarked[0] and not self._unmarked[1]:
            # What is covered is as young as what continues it, so nothing unmarked is left anywhere.
            self._phase += 1
            self._marked, self._unmarked = self._unmarked, self._marked
        page = (self._unmarked[1] or self._unmarked[0]).choose(self._random)
        self.remove(page)
        return page

    def check(self, covered: dict[P, bool]) -> None:
        super().check(covered)
        if self._covered != {page for page in covered if covered[page]}:
            raise RuntimeError("the eviction order covers other pages than those that are continued")
        open_pages = [page for page in covered if not covered[page]]
        if not all(page in self._bag(page) for page in open_pages) or len(open_pages) != sum(
            map(len, (*self._marked, *self._unmarked))
        ):
            raise RuntimeError("a page is not where its mark and bit belong")


def order_of(eviction: str, seed: int) -> Order[P]:
    """The order named `eviction`. Raises ValueError for another name."""
    match eviction:
        case "lru":
            return Lru()
        case "discard":
            return Discard()
        case "phase":
            return Phase(seed)
    raise ValueError(f"eviction is {eviction!r}: choose one of 'lru', 'discard', 'phase'")


class Paging(Generic[P]):
    """A cache of `capacity` equal pages."""

    def __init__(self, capacity: int, order: Order[P]) -> None:
        self.capacity = capacity
        self.order = order
        self._pages: set[P] = set()

    def __contains__(self, page: P) -> bool:
        return page in self._pages

    def request(self, page: P, bit: int) -> bool:
        """Serve a request; whether the page was there."""
        hit = page in self._pages
        if hit:
            self.order.remove(page)
        else:
            if len(self._pages) == self.capacity:
                self._pages.remove(self.order.victim())
            self._pages.add(page)
        self.order.add(page, bit)
        return hit
