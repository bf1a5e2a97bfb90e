"""Which page of the KV cache holds which tokens, and who uses it. No tensors here.

A page holds the keys and values of `size` consecutive tokens of a text, which begin at a multiple
of `size`. Texts that begin alike share full pages: a page is found by the chain of all tokens up to
its end, so it never has to be written again. Pages that nobody uses stay until the room is needed,
the least recently used go first. Sources: PagedAttention (Kwon et al. 2023), RadixAttention (Zheng
et al. 2024).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from itertools import takewhile


class Node:
    """Tokens of a page behind those of its parent; a full page may have children.

    number: the page, None if another text has it now.
    """

    __slots__ = ("children", "number", "parent", "tokens")

    def __init__(self, parent: Node | None = None, tokens: tuple[int, ...] = ()) -> None:
        self.parent, self.tokens = parent, tokens
        self.number: int | None = None
        self.children: dict[int, list[Node]] = {}  # by first token


class PageTable:
    """The pages of one text.

    pages: numbers[i] holds the tokens from (first + i) * size on; first is above 0 under a window.
    length: tokens of the text that are read, that is stored in the pages.
    """

    __slots__ = ("first", "length", "namespace", "node", "numbers", "shared", "text")

    def __init__(self, text: Sequence[int], namespace: Hashable, node: Node) -> None:
        self.text, self.namespace = text, namespace
        self.first, self.length = 0, 0
        self.numbers: list[int] = []
        self.node = node  # of the newest page that others can find
        self.shared = 0  # pages up to there, those before `first` included


class Pages:
    """All pages: at most `limit` of `size` tokens each.

    window: of the mask; pages before it are given back. idle: pages that may stay filled for later
    texts while there is still room to grow; beyond it, idle pages are at most half of all.
    """

    def __init__(self, size: int, limit: int, window: int | None = None, idle: int = 0) -> None:
        self.size, self.limit, self.window, self.idle = size, limit, window, idle
        self.clear()

    def clear(self) -> None:
        """Forget everything; no table may be in use afterwards."""
        self.made = 0
        """Pages 0..made - 1 have been given out so far."""
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
        """Pages that nobody uses."""
        return self.limit - self.made + len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        return self.made - len(self._free) - len(self._unused)

    # Texts

    def open(
        self, text: Sequence[int], namespace: Hashable = None, reuse: bool = True
    ) -> PageTable:
        """A table for a text, which may grow, with the longest prefix that is stored.

        The last token is never part of it, because the logits of the next one come from it.
        namespace: prefixes are shared within one only.
        """
        if len(self._roots) > self.limit:  # some are empty by now
            self._roots = {name: root for name, root in self._roots.items() if root.children}
        root = self._roots.setdefault(namespace, Node())
        table = PageTable(text, namespace, root)
        if reuse:
            self._find(table)
        self._open.append(table)
        return table

    def _find(self, table: PageTable) -> None:
        path: list[Node] = []
        usable, size = len(table.text) - 1, self.size
        node = table.node
        while len(tokens := tuple(table.text[len(path) * size : (len(path) + 1) * size])) == size:
            found = [child for child in node.children.get(tokens[0], ()) if child.tokens == tokens]
            if not found or (len(path) + 1) * size > usable:
                break
            node = found[0]
            path.append(node)
        stored = [0]  # how many pages before the end of each page of the path are there
        for step in path:
            stored.append(stored[-1] + 1 if step.number is not None else 0)
        # a part of one more page
        tail, rest = None, table.text[len(path) * size : usable]
        best, n = 0, len(path)
        if rest and self.available > n + 1:
            for stored_tokens, number in self._tails(node, rest[0]):
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
            self._hold(step.number)
            table.numbers.append(step.number)
        if tail is not None:
            self._hold(tail)  # or it could become its own copy
            copy = self._take()
            assert copy is not None
            self._let_go(tail)
            self.copies.append((tail, copy))
            table.numbers.append(copy)

    def _tails(self, node: Node, token: int) -> Iterator[tuple[Sequence[int], int]]:
        """Pages behind a node that begin with a token, also those that are being filled."""
        for child in node.children.get(token, ()):
            if child.number is not None:
                yield child.tokens, child.number
        for table in self._open:
            if table.node is node and table.first <= table.shared:
                at = table.shared - table.first
                if at < len(table.numbers):
                    yield table.text[table.shared * self.size : table.length], table.numbers[at]

    def _first(self, length: int) -> int:
        """Of a text of this length, the first page that the next token sees."""
        return 0 if self.window is None else max(0, length - self.window + 1) // self.size

    def extend(self, table: PageTable, length: int) -> bool:
        """Add pages for the first `length` tokens of a text; False, and nothing added, if there are
        too few."""
        missing = -(-length // self.size) - table.first - len(table.numbers)
        if missing > self.available:
            return False
        for _ in range(missing):
            number = self._take()
            assert number is not None
            table.numbers.append(number)
        return True

    def fill(self, table: PageTable, length: int) -> None:
        """The first `length` tokens of the text are stored now: share its full pages, and give back
        those before the window."""
        table.length = length
        while (table.shared + 1) * self.size <= length:
            self._share(table, self.size)
        while table.first < min(self._first(length), table.shared):
            self._let_go(table.numbers.pop(0))
            table.first += 1

    def close(self, table: PageTable, keep: bool = True) -> None:
        """The text ends, or makes room. keep: its last page can be found, too."""
        if table in self._open:
            self._open.remove(table)
        rest = table.length - table.shared * self.size
        if keep and rest > 0:
            self._share(table, rest)
        for number in reversed(table.numbers):  # so that the end of a text is overwritten first
            self._let_go(number)
        table.numbers, table.length = [], 0

    def _share(self, table: PageTable, count: int) -> None:
        """Let others find the next page, which holds `count` tokens."""
        at, start = table.shared - table.first, table.shared * self.size
        tokens = tuple(table.text[start : start + count])
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
        elif node.number != own:  # another text was faster: use its page
            self._hold(node.number)
            self._let_go(own)
            table.numbers[at] = node.number
        table.node = node
        table.shared += 1

    # Pages

    def _hold(self, number: int) -> None:
        self._users[number] = self._users.get(number, 0) + 1
        self._unused.pop(number, None)

    def _let_go(self, number: int) -> None:
        self._users[number] -= 1
        if not self._users[number]:
            del self._users[number]
            if number in self._nodes:
                self._unused[number] = None
            else:
                self._free.append(number)

    def _take(self) -> int | None:
        """A page for new tokens."""
        grow = self.made < self.limit
        if self._free:
            number = self._free.pop()
        elif grow and (self.made < self.idle or 2 * len(self._unused) <= self.made):
            number, self.made = self.made, self.made + 1
        elif self._unused:
            number = self._unused.popitem(last=False)[0]
            self._forget(self._nodes.pop(number))
        else:
            return None
        self._hold(number)
        return number

    def _forget(self, node: Node) -> None:
        node.number = None
        while node.parent is not None and node.number is None and not node.children:
            parent, node.parent = node.parent, None
            siblings = parent.children[node.tokens[0]]
            siblings.remove(node)
            if not siblings:
                del parent.children[node.tokens[0]]
            node = parent
