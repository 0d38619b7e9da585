"""llama.cpp through the package that ships its library: logits, greedy tokens, features of images."""

from pathlib import Path

import numpy as np
import pytest


def load_or_skip():
    """The package; with xllamacpp's library of the same structures where its own is built for a newer libc. A skip
    that says why where neither can be used.
    """
    package = pytest.importorskip("llama_cpp_py_sync", reason="llama_cpp_py_sync is not installed")
    bindings = package._cffi_bindings
    try:
        bindings.get_lib()
        bindings.get_mtmd_lib()
    except (RuntimeError, OSError) as error:
        other = pytest.importorskip("xllamacpp.xllamacpp", reason=f"llama.cpp can't be loaded: {str(error)[:200]}")
        bindings._lib = bindings._mtmd_lib = bindings.get_ffi().dlopen(other.__file__)
        settings = bindings._lib.llama_context_default_params()
        if (settings.n_batch, settings.n_ubatch, settings.n_seq_max) != (2048, 512, 1):
            pytest.skip("xllamacpp has another release of llama.cpp than llama_cpp_py_sync declares")
    return package


class LlamaCpp:
    """A GGUF model; keys and values of the cache are float32."""

    def __init__(self, path: Path, context: int = 1024):
        self.model = load_or_skip().Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=1, type_k="f32", type_v="f32", flash_attn_type=0
        )
        self._lib, self._ffi = self.model._lib, self.model._ffi

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [positions, vocabulary]."""
        self.model._clear_context_state()
        self._decode(ids, 0, whole=True)
        return np.stack([self._row(index) for index in range(len(ids))])

    def greedy(self, ids: list[int], count: int, ends: set[int]) -> list[int]:
        """The next tokens, up to `count` or the first of `ends`, which is left out."""
        self.model._clear_context_state()
        self._decode(ids, 0)
        return self._go_on(len(ids), count, ends)

    def _go_on(self, position: int, count: int, ends: set[int]) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            token = int(self._row(-1).argmax())
            if token in ends:
                break
            found.append(token)
            self._decode([token], position)
            position += 1
        return found

    def _row(self, index: int) -> np.ndarray:
        row = self._lib.llama_get_logits_ith(self.model._ctx, index)
        return np.frombuffer(self._ffi.buffer(row, 4 * self.model.n_vocab), np.float32).copy()

    def _decode(self, ids: list[int], position: int, whole: bool = False) -> None:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = whole or index == len(ids) - 1
        assert self._lib.llama_decode(self.model._ctx, batch) == 0
        self._lib.llama_batch_free(batch)

    def see(self, projector: Path, text: str, image: bytes, count: int, ends: set[int]) -> tuple[np.ndarray, list[int]]:
        """(features of a PNG float32 [patches, width], greedy tokens after `text`, whose `<image>` it stands for)."""
        context = self.model._get_multimodal_context(str(projector), discover_projector=False, use_gpu=False)
        self.model._clear_context_state()
        marked = text.replace("<image>", context.marker)
        with context.tokenize_prompt(marked, [("image/png", image)]) as prompt:
            features = [np.array(chunk.embeddings, np.float32) for chunk in prompt if chunk.type == "image"]
            position = context.evaluate_prompt(prompt)
        return np.concatenate(features), self._go_on(position, count, ends)
