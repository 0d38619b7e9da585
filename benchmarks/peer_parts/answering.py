"""What answers in benchmarks/peers.py: each loads one language model's folder and makes tokens of prompts.

`answer(prompts, count)` gives exactly `count` tokens, greedily, for each prompt (ids); all prompts are given at once.
`prepare(prompts, count)` comes before, and isn't timed: it makes room for keys and values.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

Prompts = Sequence[Sequence[int]]


class Ours:
    """This project's engine, with an empty cache for each call."""

    def __init__(self, folder: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from llava.model.families import family_of_llm
        from llava.model.loader import LoadedModel, context_length

        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        family = family_of_llm(plain.config.model_type, folder)
        config = family.config_class(**plain.config.to_dict())
        with torch.device("meta"):
            model = family.model_class(config)
        model.load_state_dict(plain.state_dict(), assign=True)
        model.model.rotary_emb = plain.model.rotary_emb
        model.tie_weights()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.loaded = LoadedModel(tokenizer, model.eval(), None, context_length(config))

    def prepare(self, prompts: Prompts, count: int) -> None:
        from llava.generation import Engine

        self.engine = Engine(self.loaded, max_batch_size=len(prompts), cache_bytes=2 << 30, prefix_bytes=0)

    def answer(self, prompts: Prompts, count: int) -> list[list[int]]:
        from llava.generation import Request, SamplingParams

        sampling = SamplingParams(max_new_tokens=count, ignore_eos=True)
        requests = [Request(ids, sampling=sampling) for ids in prompts]
        return [answer.token_ids for answer in self.engine.generate(requests)]


class Generate:
    """transformers' `generate`: one batch, padded on the left."""

    def __init__(self, folder: str):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def prepare(self, prompts: Prompts, count: int) -> None:
        pass

    @torch.inference_mode()
    def answer(self, prompts: Prompts, count: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in prompts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
        self.model.generation_config.eos_token_id = None
        found = self.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0, use_cache=True
        )
        return found[:, longest:].tolist()


class Continuous(Generate):
    """transformers' continuous batching; its manager runs on from call to call of as many requests."""

    manager = None
    requests = 0

    def prepare(self, prompts: Prompts, count: int) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        if len(prompts) == self.requests:
            return
        if self.manager is not None:
            self.close()
        self.requests = len(prompts)
        # As many pages as it takes; what it finds by itself would be most of the memory.
        pages = sum(-(-(len(one) + _MOST_NEW) // _PAGE) for one in prompts) + len(prompts)
        longest = max(512, sum(map(len, prompts)))
        self.manager = self.model.init_continuous_batching(
            GenerationConfig(max_new_tokens=_MOST_NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(page_size=_PAGE, num_blocks=pages, max_batch_tokens=longest),
        )
        self.manager.start()

    def close(self) -> None:
        self.manager.stop(block=True)

    def answer(self, prompts: Prompts, count: int) -> list[list[int]]:
        ids = self.manager.add_requests([list(one) for one in prompts], max_new_tokens=count)
        found = {}
        while len(found) < len(ids):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
            elif result is None and not self.manager.is_running():
                raise RuntimeError("continuous batching has stopped")
        return [found[id] for id in ids]


_PAGE, _MOST_NEW = 64, 128


class LlamaCpp:
    """llama.cpp's library: prompts and then one token of each sequence a batch, keys and values in float32."""

    def __init__(self, folder: str, threads: int = 2):
        from peer_parts.gguf_file import write_gguf

        self.ffi, self.lib = _library()
        self.threads = threads
        # What it says about the model goes nowhere.
        self.silence = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
        self.lib.llama_log_set(self.silence, self.ffi.NULL)
        self.lib.llama_backend_init()
        with tempfile.TemporaryDirectory() as where:
            path = Path(where) / "model.gguf"
            self.vocabulary = write_gguf(folder, path)
            settings = self.lib.llama_model_default_params()
            self.model = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        if self.model == self.ffi.NULL:
            raise RuntimeError(f"llama.cpp can't load {folder}")
        self.batch = self.lib.llama_batch_init(_BATCH, 0, 1)
        self.context = None

    def prepare(self, prompts: Prompts, count: int) -> None:
        if self.context is not None:
            self.lib.llama_free(self.context)
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = len(prompts) * (-(-(max(map(len, prompts)) + count) // 256) * 256)
        settings.n_batch, settings.n_ubatch, settings.n_seq_max = _BATCH, 512, len(prompts)
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32, as everybody's here
        settings.flash_attn_type = -1  # it chooses
        self.context = self.lib.llama_init_from_model(self.model, settings)
        if self.context == self.ffi.NULL:
            raise RuntimeError("llama.cpp can't make a context")

    def answer(self, prompts: Prompts, count: int) -> list[list[int]]:
        tokens = self._prefill(prompts)
        answers = [[token] for token in tokens]
        for step in range(count - 1):
            tokens = self._decode([(row, token, len(prompts[row]) + step, True) for row, token in enumerate(tokens)])
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
        return answers

    def _prefill(self, prompts: Prompts) -> list[int]:
        """Whole prompts, as many at a time as fit a batch; the first token of each answer."""
        found: list[int] = []
        part: list[tuple[int, int, int, bool]] = []
        for row, prompt in enumerate(prompts):
            if part and len(part) + len(prompt) > _BATCH:
                found += self._decode(part)
                part = []
            part += [(row, token, place, place == len(prompt) - 1) for place, token in enumerate(prompt)]
        return found + self._decode(part)

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """The likeliest tokens after those of (sequence, token, position, whether one is wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for place, (row, token, position, wanted) in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
        if code := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp's llama_decode ended with {code}")
        wanted = sum(row[3] for row in rows)
        size = wanted * self.vocabulary
        logits = np.frombuffer(self.ffi.buffer(self.lib.llama_get_logits(self.context), 4 * size), np.float32)
        return logits.reshape(wanted, -1).argmax(1).tolist()


_BATCH = 2048


def _library():
    """llama.cpp's declarations and library; where llama-cpp-py-sync's is built for a newer libc, xllamacpp's."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    try:
        return get_ffi(), get_lib()
    except RuntimeError:
        import xllamacpp.xllamacpp

        lib = get_ffi().dlopen(xllamacpp.xllamacpp.__file__)
    settings = lib.llama_context_default_params()
    if (settings.n_batch, settings.n_ubatch, settings.n_seq_max) != (2048, 512, 1):
        raise RuntimeError("xllamacpp has another release of llama.cpp than llama-cpp-py-sync declares")
    return get_ffi(), lib
