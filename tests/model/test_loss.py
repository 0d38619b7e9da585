import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from llava.model.loss import causal_loss


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
