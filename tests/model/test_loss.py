import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from llava.model.loss import LanguageHead, causal_loss


def whole(hidden_states, lm_head, labels):
    logits = lm_head(hidden_states).float()
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("chunk", [1, 50, 170, 10**9])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(chunk):
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 50, bias=False)
    hidden_states = torch.randn(3, 11, 8, requires_grad=True)
    labels = torch.randint(0, 50, (3, 11))
    labels[:, :4] = -100
    labels[1] = -100
    wanted = whole(hidden_states, lm_head, labels)
    wanted_gradients = torch.autograd.grad(wanted, [hidden_states, lm_head.weight])
    loss = causal_loss(hidden_states, lm_head, labels, 50, chunk_elements=chunk)
    gradients = torch.autograd.grad(loss, [hidden_states, lm_head.weight])
    torch.testing.assert_close(loss, wanted)
    for found, gradient in zip(gradients, wanted_gradients):
        torch.testing.assert_close(found, gradient)


def test_without_targets_the_loss_is_zero_and_reaches_every_weight():
    lm_head = nn.Linear(8, 50, bias=False)
    hidden_states = torch.randn(2, 3, 8, requires_grad=True)
    loss = causal_loss(hidden_states, lm_head, torch.full((2, 3), -100), 50)
    loss.backward()
    assert loss.item() == 0
    assert lm_head.weight.grad.abs().sum() == 0 and hidden_states.grad.abs().sum() == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [403 * 8, 10**9])
def test_a_vocabulary_filled_up_to_aligned_rows_has_the_same_loss(bias, chunk):
    """In half precision the head multiplies with 448 columns where there are 403 tokens."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 403, bias=bias)
    labels = torch.randint(0, 403, (2, 30))
    hidden_states = torch.randn(2, 30, 32)
    results, columns = [], []
    for dtype in (torch.float32, torch.float16):
        head = LanguageHead.of(linear).to(dtype)
        inputs = hidden_states.to(dtype).requires_grad_()
        with Shapes() as seen:
            loss = causal_loss(inputs, head, labels, 403, chunk_elements=chunk)
            results.append([loss, *torch.autograd.grad(loss, [inputs, *head.parameters()])])
        columns.append({shape[-1] for shape in seen.of_logits})
    assert columns == [{403}, {448}] and results[1][0].dtype == torch.float32
    for whole, half in zip(*results, strict=True):
        assert whole.shape == half.shape and (half.float() - whole).norm() < 2e-3 * whole.norm()


@pytest.mark.parametrize("chunk", [50 * 64, 10**9])
def test_numbers_of_targets_share_few_shapes_where_each_new_one_takes_memory(chunk):
    """bfloat16 on the CPU: 380 numbers of targets left 2 GB behind for a vocabulary of 4,915."""
    torch.manual_seed(0)
    head = LanguageHead.of(nn.Linear(8, 50, bias=False))
    shapes = set()
    for count in range(100, 180):
        hidden_states = torch.randn(1, count + 1, 8, requires_grad=True)
        labels = torch.randint(0, 50, (1, count + 1))
        with torch.autocast("cpu", torch.bfloat16), Shapes() as seen:
            loss = causal_loss(hidden_states, head, labels, 50, chunk_elements=chunk)
            loss.backward()
        shapes |= seen.of_logits
        torch.testing.assert_close(loss, whole(hidden_states, head, labels), rtol=1e-2, atol=0)
        assert not hidden_states.grad[:, -1].any() and hidden_states.grad[:, :-1].any(-1).all()
    assert len(shapes) <= 4


class Shapes(TorchDispatchMode):
    """The shapes of the logits that cross entropies are made of."""

    def __init__(self):
        super().__init__()
        self.of_logits = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._log_softmax.default:
            self.of_logits.add(tuple(args[0].shape))
        return function(*args, **kwargs or {})
