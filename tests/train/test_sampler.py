from types import SimpleNamespace

import numpy as np

from llava.train.data.sampler import EpochSampler
from llava.train.trainer import LlavaTrainer


class Sized:
    """What a trainer asks of samples to put them in order."""

    def __init__(self, number, lengths, is_image):
        self.number = number
        self.lengths, self.has_image = lambda: lengths, lambda: is_image

    def __len__(self):
        return self.number


def test_every_epoch_is_another_permutation_and_repeatable():
    sampler = EpochSampler(100, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert EpochSampler(100, seed=3).order(1).tolist() == second


def test_grouping_keeps_kinds_apart_and_saves_padding():
    random = np.random.default_rng(0)
    lengths = random.integers(10, 1000, 1000)
    is_image = random.random(1000) < 0.7
    sampler = EpochSampler(1000, seed=0, lengths=lengths, is_image=is_image, batch_size=8)
    order = np.array(list(sampler))
    assert sorted(order) == list(range(1000))
    whole = (is_image.sum() // 8 + (~is_image).sum() // 8) * 8
    batches = order[:whole].reshape(-1, 8)
    assert all(len(set(is_image[batch])) == 1 for batch in batches)
    padded = sum(lengths[batch].max() * 8 for batch in batches)
    plain = np.array(list(EpochSampler(1000, seed=0)))[:whole].reshape(-1, 8)
    assert padded < 0.75 * sum(lengths[batch].max() * 8 for batch in plain)


def test_grouping_does_not_sort_the_epoch():
    lengths = np.arange(1000)
    order = EpochSampler(1000, seed=0, lengths=lengths, batch_size=10).order(0)
    means = lengths[order].reshape(-1, 10).mean(axis=1)
    assert abs(np.corrcoef(np.arange(100), means)[0, 1]) < 0.4


def test_sequential_order_is_the_file_order():
    assert list(EpochSampler(5, seed=1, shuffle=False)) == [0, 1, 2, 3, 4]


def test_fewer_samples_than_a_batch():
    assert sorted(EpochSampler(3, seed=0, lengths=[5, 6, 7], is_image=[True, False, True], batch_size=8)) == [0, 1, 2]


def test_batches_of_like_length_do_not_depend_on_the_number_of_processes():
    """A run may be resumed on another number, with as many samples in an optimizer step."""
    lengths, is_image = np.random.default_rng(0).integers(10, 1000, 64), np.arange(64) % 3 > 0
    dataset = Sized(64, lengths, is_image)
    orders = []
    for processes, micro_batches in ((8, 1), (4, 2), (1, 8)):
        args = SimpleNamespace(
            **{"world_size": processes, "gradient_accumulation_steps": micro_batches, "train_batch_size": 2},
            **{"seed": 0, "data_seed": None, "group_by_modality_length": True, "train_sampling_strategy": "random"},
        )
        orders.append(list(LlavaTrainer._get_train_sampler(SimpleNamespace(args=args), dataset)))
    assert orders[0] == orders[1] == orders[2]
