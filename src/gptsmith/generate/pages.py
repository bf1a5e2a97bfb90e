"""Which page of the KV cache holds which tokens, and who uses it. No tensors here.

A page holds the keys and values of `size` consecutive tokens of a sequence, starting at a multiple
of `size`. Sequences with a common prefix share its full pages: a page is found by all tokens up to
its end, and is never written again. Pages that no sequence uses stay until space is needed; the
least recently used are evicted first. Sources: PagedAttention (Kwon et al. 2023), RadixAttention
(Zheng et al. 2024).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from itertools import takewhile


class Node:
    """A page in the tree of prefixes: its tokens follow those of its parent. Only full pages have
    children.

    number: the page, None once it has been evicted.
    """

    __slots__ = ("children", "number", "parent", "tokens")

    def __init__(self, parent: Node | None = None, tokens: tuple[int, ...] = ()) -> None:
        self.parent, self.tokens = parent, tokens
        self.number: int | None = None
        self.children: dict[int, list[Node]] = {}  # by first token


class PageTable:
    """The pages of one sequence.

    numbers: page numbers[i] holds the tokens from (first + i) * size on; first is above 0 under a
    sliding window. length: number of tokens that are stored in the pages.
    """

    __slots__ = ("first", "length", "namespace", "node", "numbers", "shared", "tokens")

    def __init__(self, tokens: Sequence[int], namespace: Hashable, node: Node) -> None:
        self.tokens, self.namespace = tokens, namespace
        self.first, self.length = 0, 0
        self.numbers: list[int] = []
        self.node = node  # of the last page that other sequences can find
        self.shared = 0  # number of pages up to there, including those before `first`


class Pages:
    """All pages: at most `limit` of `size` tokens each.

    window: of the mask; pages before it are released. idle: unused pages that may stay filled for
    later sequences while more can be allocated; beyond it, at most half of all pages are unused.
    """

    def __init__(self, size: int, limit: int, window: int | None = None, idle: int = 0) -> None:
        self.size, self.limit, self.window, self.idle = size, limit, window, idle
        self.clear()

    def clear(self) -> None:
        """Forget everything; no table may be in use afterwards."""
        self.made = 0
        """Pages 0..made - 1 have been allocated so far."""
        self.copies: list[tuple[int, int]] = []
        """(from, to): pages to be copied, in this order, before anything is written."""
        self._free: list[int] = []
        self._users: dict[int, int] = {}
        self._nodes: dict[int, Node] = {}  # pages that can be found
        self._unused: OrderedDict[int, None] = OrderedDict()  # of these; least recently used first
        self._roots: dict[Hashable, Node] = {}
        self._open: list[PageTable] = []

    @property
    def available(self) -> int:
        """Pages that no sequence uses."""
        return self.limit - self.made + len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        return self.made - len(self._free) - len(self._unused)

    # Sequences

    def open(
        self, tokens: Sequence[int], namespace: Hashable = None, reuse: bool = True
    ) -> PageTable:
        """A table for a sequence, which may grow, with the longest prefix that is stored.

        The prefix never includes the last token, whose logits are needed for the next one.
        namespace: prefixes are shared within a namespace only.
        """
        if len(self._roots) > self.limit:  # some are empty by now
            self._roots = {name: root for name, root in self._roots.items() if root.children}
        root = self._roots.setdefault(namespace, Node())
        table = PageTable(tokens, namespace, root)
        if reuse:
            self._find(table)
        self._open.append(table)
        return table

    def _find(self, table: PageTable) -> None:
        path: list[Node] = []
        usable, size = len(table.tokens) - 1, self.size
        node = table.node
        while len(tokens := tuple(table.tokens[len(path) * size : (len(path) + 1) * size])) == size:
            found = [child for child in node.children.get(tokens[0], ()) if child.tokens == tokens]
            if not found or (len(path) + 1) * size > usable:
                break
            node = found[0]
            path.append(node)
        stored = [0]  # how many consecutive pages up to each page of the path have not been evicted
        for step in path:
            stored.append(stored[-1] + 1 if step.number is not None else 0)
        # the beginning of one more page
        tail, rest = None, table.tokens[len(path) * size : usable]
        best, n = 0, len(path)
        if rest and self.available > n + 1:
            for stored_tokens, number in self._partial_matches(node, rest[0]):
                pairs = zip(stored_tokens, rest, strict=False)
                equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                if equal > best and stored[n] >= n - self._first(n * size + equal):
                    best, tail = equal, number
        if tail is None:
            while stored[n] < n - self._first(n * size):
                n -= 1
        table.length = n * size + best
        table.first = min(self._first(table.length), n)
        table.shared, table.node = n, path[n - 1] if n else table.node
        for step in path[table.first : n]:
            assert step.number is not None
            self._retain(step.number)
            table.numbers.append(step.number)
        if tail is not None:
            self._retain(tail)  # or it could be evicted to hold its own copy
            copy = self._allocate()
            assert copy is not None
            self._release(tail)
            self.copies.append((tail, copy))
            table.numbers.append(copy)

    def _partial_matches(self, node: Node, token: int) -> Iterator[tuple[Sequence[int], int]]:
        """Pages after a node that begin with a token, including those that are being filled."""
        for child in node.children.get(token, ()):
            if child.number is not None:
                yield child.tokens, child.number
        for table in self._open:
            if table.node is node and table.first <= table.shared:
                at = table.shared - table.first
                if at < len(table.numbers):
                    yield table.tokens[table.shared * self.size : table.length], table.numbers[at]

    def _first(self, length: int) -> int:
        """The first page that the next token of a sequence of this length attends to."""
        return 0 if self.window is None else max(0, length - self.window + 1) // self.size

    def extend(self, table: PageTable, length: int) -> bool:
        """Allocate pages for the first `length` tokens of a sequence; False, and none allocated, if
        too few are available."""
        missing = -(-length // self.size) - table.first - len(table.numbers)
        if missing > self.available:
            return False
        for _ in range(missing):
            number = self._allocate()
            assert number is not None
            table.numbers.append(number)
        return True

    def fill(self, table: PageTable, length: int) -> None:
        """Record that the first `length` tokens are stored: share the full pages, and release those
        before the window."""
        table.length = length
        while (table.shared + 1) * self.size <= length:
            self._share(table, self.size)
        while table.first < min(self._first(length), table.shared):
            self._release(table.numbers.pop(0))
            table.first += 1

    def close(self, table: PageTable, keep: bool = True) -> None:
        """Release the pages of a sequence. keep: its last, partly filled page can be found, too."""
        if table in self._open:
            self._open.remove(table)
        rest = table.length - table.shared * self.size
        if keep and rest > 0:
            self._share(table, rest)
        for number in reversed(table.numbers):  # so that the end of a sequence is evicted first
            self._release(number)
        table.numbers, table.length = [], 0

    def _share(self, table: PageTable, count: int) -> None:
        """Let other sequences find the next page, which holds `count` tokens."""
        at, start = table.shared - table.first, table.shared * self.size
        tokens = tuple(table.tokens[start : start + count])
        if table.shared == 0:  # the root may be gone
            table.node = self._roots.setdefault(table.namespace, table.node)
        siblings = table.node.children.setdefault(tokens[0], [])
        same = [node for node in siblings if node.tokens[:count] == tokens]  # or they hold more
        node = next((n for n in same if n.number is not None or len(n.tokens) == count), None)
        if node is None:
            node = Node(table.node, tokens)
            siblings.append(node)
        own = table.numbers[at]
        if node.number is None:
            node.number = own
            self._nodes[own] = node
        elif node.number != own:  # another sequence was faster: use its page
            self._retain(node.number)
            self._release(own)
            table.numbers[at] = node.number
        table.node = node
        table.shared += 1

    # Pages

    def _retain(self, number: int) -> None:
        self._users[number] = self._users.get(number, 0) + 1
        self._unused.pop(number, None)

    def _release(self, number: int) -> None:
        self._users[number] -= 1
        if not self._users[number]:
            del self._users[number]
            if number in self._nodes:
                self._unused[number] = None
            else:
                self._free.append(number)

    def _allocate(self) -> int | None:
        """A page for new tokens, evicting another if need be; None if all are in use."""
        grow = self.made < self.limit
        if self._free:
            number = self._free.pop()
        elif grow and (self.made < self.idle or 2 * len(self._unused) <= self.made):
            number, self.made = self.made, self.made + 1
        elif self._unused:
            number = self._unused.popitem(last=False)[0]
            self._evict(self._nodes.pop(number))
        else:
            return None
        self._retain(number)
        return number

    def _evict(self, node: Node) -> None:
        node.number = None
        while node.parent is not None and node.number is None and not node.children:
            parent, node.parent = node.parent, None
            siblings = parent.children[node.tokens[0]]
            siblings.remove(node)
            if not siblings:
                del parent.children[node.tokens[0]]
            node = parent
