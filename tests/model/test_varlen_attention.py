"""Every signature a kernel has had, against softmax sample by sample; torch's own on fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from llava.errors import LlavaError
from llava.model.varlen_attention import flash_kernel, torch_kernel, varlen_attention
from llava.train.step import gpu
from llava.train.step.packing import packed_attention

LENGTHS = (3, 1, 7)
BORDERS = torch.tensor([0, 3, 4, 11], dtype=torch.int32)


def reference(q, k, v, scale, window, borders=(BORDERS, BORDERS)):
    """`[tokens, heads, size]`, each sequence by itself; its last query sees all of its keys."""
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    own, seen = (border.diff().tolist() for border in borders)
    outs = []
    for parts in zip(q.split(own), k.split(seen), v.split(seen)):
        queries, keys, values = (part.transpose(0, 1) for part in parts)
        before = keys.shape[1] - queries.shape[1]
        sees = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(before)
        sees = sees.triu(before + 1 - (window or keys.shape[1]))
        outs.append(scaled_dot_product_attention(queries, keys, values, attn_mask=sees, scale=scale).transpose(0, 1))
    return torch.cat(outs)


def check(q, k, v, borders, longest, groups: bool):
    """What every kernel needs."""
    assert q.dtype == k.dtype == v.dtype and q.is_contiguous() and k.is_contiguous()
    assert longest == [border.diff().max() for border in borders]
    assert [border.dtype for border in borders] == [torch.int32] * 2
    assert [len(q), len(k)] == [border[-1] for border in borders]
    assert groups or q.shape[1] == k.shape[1], "this release takes no grouped queries"


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    check(query, key, value, (cu_seq_q, cu_seq_k), [max_q, max_k], groups=False)
    assert is_causal
    return reference(query, key, value, None, None, (cu_seq_q, cu_seq_k))


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    check(query, key, value, (cu_seq_q, cu_seq_k), [max_q, max_k], groups=False)
    return reference(query, key, value, scale, window_of(window_size), (cu_seq_q, cu_seq_k))


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None,
):  # fmt: skip
    check(query, key, value, (cu_seq_q, cu_seq_k), [max_q, max_k], groups=True)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return reference(query, key, value, scale, window_of(window_size), (cu_seq_q, cu_seq_k))


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    check(q, k, v, (cu_seqlens_q, cu_seqlens_k), [max_seqlen_q, max_seqlen_k], groups=True)
    assert causal
    window = None if window_size == (-1, -1) else window_of(window_size)
    return reference(q, k, v, softmax_scale, window, (cu_seqlens_q, cu_seqlens_k))


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    return flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal,
                   window_size), None  # fmt: skip


def window_of(window_size):
    left, right = window_size
    assert right == 0, "not causal"
    return None if left == -1 else left + 1


KERNELS = {
    "torch 2.10": torch_kernel(torch_2_10),
    "torch 2.11": torch_kernel(torch_2_11),
    "torch 2.12": torch_kernel(torch_2_12),
    "flash-attn 2": flash_kernel(flash_2),
    "flash-attn 3": flash_kernel(flash_3),
}


def tensors(heads: int, keys: int):
    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS), count, 8) for count in (heads, keys, keys)]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("keys", "scale", "window"), [(4, None, None), (2, 0.2, None), (2, 0.3, 3), (4, 0.3, 7)])
def test_every_signature_computes_causal_attention_within_samples(name, keys, scale, window):
    q, k, v = tensors(4, keys)
    work = lambda: varlen_attention(  # noqa: E731
        q, k, v, BORDERS, max(LENGTHS), scale=scale, window=window, kernel=KERNELS[name]
    )
    if name == "torch 2.10" and window == 3:
        with pytest.raises(LlavaError, match="sliding window"):
            work()
    else:
        torch.testing.assert_close(work(), reference(q, k, v, scale, window))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window", [None, 4])
def test_a_sequence_may_see_more_than_itself(name, window):
    """Two that see the first one's three tokens before their own."""
    q, k, v = tensors(4, 4)
    places = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9, 10])
    borders = BORDERS, torch.tensor([0, 3, 7, 17], dtype=torch.int32)
    work = lambda: packed_attention(  # noqa: E731
        None, *(tensor.transpose(0, 1)[None] for tensor in (q, k, v)), None, kernel=KERNELS[name],
        cu_seq_lens_q=borders[0], max_length_q=7, cu_seq_lens_k=borders[1], max_length_k=10, key_places=places,
        sliding_window=window,
    )[0][0]  # fmt: skip
    expected = reference(q, k[places], v[places], None, window, borders)
    torch.testing.assert_close(work(), expected)  # on the CPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "takes_kernel", lambda *tensors: True)
        if name == "torch 2.10" and window:
            with pytest.raises(LlavaError, match="sliding window"):
                work()
        else:
            torch.testing.assert_close(work(), expected)


def test_missing_borders_are_an_error():
    q, k, v = tensors(4, 4)
    with pytest.raises(LlavaError, match="borders"):
        varlen_attention(q, k, v, None, None, kernel=KERNELS["torch 2.12"])
    with pytest.raises(LlavaError, match="borders"):
        packed_attention(None, *(tensor.transpose(0, 1)[None] for tensor in (q, k, v)), None)


@pytest.mark.parametrize("window", [None, 3])
def test_on_the_cpu_the_window_holds_too(window):
    q, k, v = tensors(4, 2)
    out, _ = packed_attention(
        None, *(tensor.transpose(0, 1)[None] for tensor in (q, k, v)), None,
        cu_seq_lens_q=BORDERS, max_length_q=max(LENGTHS), sliding_window=window,
    )  # fmt: skip
    torch.testing.assert_close(out[0], reference(q, k, v, None, window))


def installed():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    return torch_kernel(varlen.varlen_attn)


@pytest.mark.parametrize("keys", [4, 2])
def test_the_installed_kernel_takes_a_gpus_tensors(keys):
    """Forward on fake CUDA tensors, as under autocast: rotated queries and keys in float32, values in half."""
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 11, count, 8, device="cuda").transpose(1, 2) for count in (4, keys, keys))
        borders = torch.empty(4, dtype=torch.int32, device="cuda")
        out, _ = packed_attention(
            None, q, k, v.bfloat16(), None, scaling=0.3, cu_seq_lens_q=borders, max_length_q=7, kernel=installed()
        )
    assert out.shape == (1, 11, 4, 8) and out.dtype == torch.bfloat16 and out.is_cuda


@pytest.mark.parametrize("keys", [4, 2])
def test_the_installed_kernel_has_gradients(keys):
    """Backward on fake CPU tensors: the CPU build of torch runs none on fake CUDA tensors."""
    with FakeTensorMode():
        q, k, v = (torch.empty(11, count, 8, dtype=torch.bfloat16).requires_grad_() for count in (4, keys, keys))
        borders = torch.empty(4, dtype=torch.int32)
        varlen_attention(q, k, v, borders, 7, scale=0.3, kernel=installed()).float().sum().backward()
        assert [tensor.grad.shape for tensor in (q, k, v)] == [tensor.shape for tensor in (q, k, v)]
