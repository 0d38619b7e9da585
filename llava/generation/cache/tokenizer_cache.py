"""A tokenizer with a cache: prompts of one template have most of their pieces in common."""

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from llava.errors import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIZE = 4096
_CHARACTERS = 4 << 20
"""Of all texts together: some 50 MB with their ids."""


class TokenizerCache:
    """As the tokenizer for those who only ask it for ids; everything else is passed on.

    A text that the tokenizer fails at, by a panic of its library too, is a LlavaError. The library's own cache is
    emptied for good: it holds ten thousand words for each thread that ever asks, up to 14 MB, and saves no time here.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        if hasattr(model, "_resize_cache"):
            model._resize_cache(0)
        self._known: OrderedDict[tuple[Any, ...], list[int]] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()
        self.all_special_tokens = list(tokenizer.all_special_tokens)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        key = (text, *options.items())
        with self._lock:
            ids = self._known.get(key)
            if ids is not None:
                self._known.move_to_end(key)
        if ids is None:
            with library_errors("the checkpoint's tokenizer fails at this text"):
                ids = list(self._tokenizer(text, **options)["input_ids"])
            with self._lock:
                if key not in self._known:  # another thread may have asked too
                    self._characters += len(text)
                self._known[key] = ids
                while len(self._known) > _SIZE or self._characters > _CHARACTERS:
                    (dropped, *_), _ = self._known.popitem(last=False)
                    self._characters -= len(dropped)
        return {"input_ids": list(ids)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
