"""What a training step costs beyond its arithmetic: waits for the GPU (none), and the precision it computes in."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.model.varlen_attention import Kernel
from llava.train import checks, setup_run
from llava.train.arguments import parse_arguments
from llava.train.data.record_store import open_records
from llava.train.data.shared_images import seen_by
from llava.train.prepare_model import prepare_model
from llava.train.step import packing
from llava.train.step.compute import activation_budget, compile_layers, flags_of_the_path, set_policy
from llava.train.step.loss_watch import LossWatch
from llava.train.train import train
from llava.train.trainer import LlavaTrainer
from tests.tiny import make_llava
from tests.train.helpers import flags, losses, make_records
from tests.train.test_distributed import FSDP, FSDP_ON_CPU, RUN, launch

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.equal}
"""Operators whose result's size or value the CPU needs: on a GPU it waits for them."""


class Waits(TorchDispatchMode):
    """Counts the operators that a GPU would be waited for at."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function.overloadpacket in (aten.index, aten.index_put, aten._index_put_impl_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if function.overloadpacket in WAITING or by_mask:
            self.found.append(str(function))
        return function(*args, **kwargs or {})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return {kind: make_llava(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "mistral")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("data"), 24, text_only_every=3)


def counted(monkeypatch, argv) -> list[list[str]]:
    """The waits of each micro-batch of a training."""
    found = []
    step = LlavaTrainer.training_step

    def watched(self, *args, **kwargs):
        with Waits() as waits:
            loss = step(self, *args, **kwargs)
        found.append(waits.found)
        return loss

    monkeypatch.setattr(LlavaTrainer, "training_step", watched)
    arguments = parse_arguments(argv)
    loaded = prepare_model(arguments)
    dataset, cache = setup_run.build_dataset(arguments, loaded, open_records(arguments.data.data_path))
    setup_run.build_trainer(arguments, loaded, dataset, cache).train()
    return found


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", ()),
        ("mistral", ("--packing",)),
        ("llama", ("--packing", "--gradient_checkpointing", "True")),
        ("llama", ("--lora_enable", "True", "--gradient_accumulation_steps", "2")),
        ("llama", ("--per_device_train_batch_size", "1", "--tune_mm_mlp_adapter")),
        ("llama", ("--packing", "--max_tokens_per_batch", "200", "--cache_vision_features")),
        ("llama", ("--packing", "--max_tokens_per_batch", "200", "--questions_per_image", "4")),
    ],
)
def test_no_micro_batch_waits(tmp_path, base, data, monkeypatch, kind, more):
    found = counted(monkeypatch, flags(tmp_path, data, base[kind], "--max_steps", "4", *more))
    assert len(found) >= 4 and not any(found)


def test_what_is_counted_would_be_found(tmp_path, base, data, monkeypatch):
    """Without the collator's indices the model looks for positions and targets itself."""
    collate = setup_run.Collator.__call__

    def without(self, items):
        batch = collate(self, items)
        return {key: value for key, value in batch.items() if key not in {"image_positions", "target_positions"}}

    monkeypatch.setattr(setup_run.Collator, "__call__", without)
    found = counted(monkeypatch, flags(tmp_path, data, base["llama"], "--max_steps", "1"))
    assert {"aten.nonzero.default", "aten._local_scalar_dense.default"} <= set(found[0])


def test_a_loss_that_is_no_number_is_named_at_the_next_look():
    watch = LossWatch(lambda number: f"record {number}")
    watch.note(torch.tensor(2.0), 1, [4])
    watch.look()
    for step, loss, numbers in ((2, 1.0, [5]), (3, float("nan"), [6, 7]), (4, float("inf"), [8])):
        watch.note(torch.tensor(loss), step, numbers)
    with pytest.raises(LlavaError, match="loss is nan at step 3; the batch held: record 6, record 7; "):
        watch.look()


def test_compiled_layers_train_the_same(tmp_path, base, data):
    more = ("--max_steps", "3", "--packing")
    compiled = ("--torch_compile", "True", "--torch_compile_backend", "eager", "--gradient_checkpointing", "True")
    train(flags(tmp_path / "eager", data, base["llama"], *more))
    train(flags(tmp_path / "compiled", data, base["llama"], *more, *compiled))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-5)


def test_what_a_compiled_layer_asks_of_the_gpu_is_in_its_graph():
    """Found on a GPU with torch 2.11: no call of a context variable is compiled there."""
    asks = torch.compile(packing.gpu.takes_kernel, backend="eager", fullgraph=True)
    assert asks(torch.ones(2, dtype=torch.bfloat16)) is False


def compiled_model(base, monkeypatch):
    """A core whose layers are compiled as on a GPU, and the counter of their graphs."""
    monkeypatch.setattr(packing.gpu, "takes_kernel", lambda *tensors: True)
    model = load_pretrained_model(base["llama"], device="cpu").model.get_model()
    graphs = CompileCounter()
    compile_layers(model, backend=graphs, fullgraph=True)
    packing.use_packed_attention(model.config, ONE_SAMPLE)
    return model, graphs


def test_a_compiled_layer_is_one_graph_for_all_layers_and_packs(base, monkeypatch):
    """As on a GPU: the kernel takes all tokens. One graph, and one more once the number of samples has changed."""
    model, graphs = compiled_model(base, monkeypatch)
    for borders in ([0, 5, 12], [0, 3, 8, 12], [0, 1, 2, 4, 12]):
        model(
            inputs_embeds=torch.randn(1, 12, model.config.hidden_size).requires_grad_(), use_cache=False,
            cu_seq_lens_q=torch.tensor(borders, dtype=torch.int32), max_length_q=max(np.diff(borders)).item(),
        )  # fmt: skip
    assert 1 <= graphs.frame_count <= 2


def test_a_compiled_layer_stays_one_graph_where_questions_share_an_image(base, monkeypatch):
    """One graph, one more once the number of questions has changed, and one for a pack whose image has only one."""
    model, graphs = compiled_model(base, monkeypatch)
    for lengths in ([[4, 3, 5]], [[4, 3, 2, 3]], [[2, 3], [3, 2, 2]], [[4, 2, 2, 2, 2]]):
        seen, places = seen_by(lengths)
        sizes = np.concatenate(lengths)
        model(
            inputs_embeds=torch.randn(1, 12, model.config.hidden_size).requires_grad_(), use_cache=False,
            cu_seq_lens_q=torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int32)), max_length_q=int(sizes.max()),
            cu_seq_lens_k=torch.from_numpy(np.cumsum([0, *seen]).astype(np.int32)), max_length_k=int(seen.max()),
            key_places=torch.from_numpy(places),
        )  # fmt: skip
    assert 1 <= graphs.frame_count <= 3


@pytest.mark.parametrize("more", [(), ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "1")])
def test_a_budget_of_activations_changes_no_loss(tmp_path, base, data, more):
    more = ("--max_steps", "3", "--packing", "--torch_compile", "True", "--torch_compile_backend", "aot_eager", *more)
    train(flags(tmp_path / "all", data, base["llama"], *more))
    train(flags(tmp_path / "some", data, base["llama"], *more, "--activation_memory_budget", "0.3"))
    assert losses(tmp_path / "some") == pytest.approx(losses(tmp_path / "all"), abs=1e-5)


def test_a_budget_of_activations_is_kept_and_changes_no_gradient(base, monkeypatch):
    """Of one layer, compiled: bytes kept for the backward pass lie between all and those of its input alone."""
    monkeypatch.setattr(packing.gpu, "takes_kernel", lambda *tensors: True)
    kept, gradients = {}, {}
    for share in (None, 0.5, 0.0):
        torch._dynamo.reset()
        model = load_pretrained_model(base["llama"], device="cpu").model.get_model()
        compile_layers(model, backend="aot_eager", fullgraph=True)
        packing.use_packed_attention(model.config, ONE_SAMPLE)
        hidden = torch.linspace(-1, 1, 64 * model.config.hidden_size).view(1, 64, -1).sin().requires_grad_()
        seen = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def note(tensor, seen=seen, own=own):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with activation_budget(share), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            borders = torch.tensor([0, 64], dtype=torch.int32)
            out = model(inputs_embeds=hidden, use_cache=False, cu_seq_lens_q=borders, max_length_q=64)
            out.last_hidden_state.sum().backward()
        kept[share], gradients[share] = sum(seen.values()), hidden.grad
    assert kept[None] > 1.2 * kept[0.5] > 1.2**2 * kept[0.0] > 0
    for share in (0.5, 0.0):
        torch.testing.assert_close(gradients[share], gradients[None])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--activation_memory_budget", "0.5"), "add --torch_compile True"),
        (("--activation_memory_budget", "1.5", "--torch_compile", "True"), "expected a share from 0 to 1"),
        (
            ("--activation_memory_budget", "0.5", "--torch_compile", "True", "--gradient_checkpointing", "True"),
            "choose one",
        ),
        (("--use_liger_kernel", "True"), "Liger's kernels run on GPUs alone"),
        (("--use_liger_kernel", "True", "--torch_compile", "True"), "choose one"),
    ],
)
def test_what_is_refused(tmp_path, base, data, more, message):
    with pytest.raises(LlavaError, match=message):
        parse_arguments(flags(tmp_path, data, base["llama"], *more))


def test_liger_is_looked_for_before_anything_is_loaded(tmp_path, base, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(checks.gpu, "is_on_gpu", lambda device: True)
    with pytest.raises(LlavaError, match=r"pip install \"llava-med\[liger\]\""):
        parse_arguments(flags(tmp_path, data, base["llama"], "--use_liger_kernel", "True"))


def attend_as_one(q, k, v, borders, longest, scale, window):
    parts = (tensor.transpose(0, 1) for tensor in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=scale).transpose(0, 1)


ONE_SAMPLE = Kernel(attend_as_one, takes_groups=True)


@pytest.mark.parametrize(
    ("more", "length"), [((), None), (("--bf16", "True"), 200), (("--torch_compile", "True"), 200)]
)
def test_packs_have_one_length_where_something_is_kept_for_each(tmp_path, base, data, more, length):
    packed = ("--packing", "--max_tokens_per_batch", "200")
    assert setup_run.pack_length(parse_arguments(flags(tmp_path, data, base["llama"], *packed, *more))) == length


def test_batches_of_several_packs_have_one_length_too(tmp_path, base, data):
    more = ("--packing", "--max_tokens_per_batch", "150", "--per_device_train_batch_size", "2", "--bf16", "True")
    arguments = parse_arguments(flags(tmp_path, data, base["llama"], *more))
    loaded = prepare_model(arguments)
    dataset, cache = setup_run.build_dataset(arguments, loaded, open_records(data))
    batches = list(setup_run.build_trainer(arguments, loaded, dataset, cache).get_train_dataloader())
    assert len(batches) > 1 and {tuple(batch["input_ids"].shape) for batch in batches} == {(1, 300)}


def test_packs_of_one_length_have_the_same_loss(tmp_path, base, data, monkeypatch):
    more = ("--max_steps", "3", "--packing", "--max_tokens_per_batch", "200")
    train(flags(tmp_path / "as_they_are", data, base["llama"], *more))
    monkeypatch.setattr(setup_run, "pack_length", lambda arguments: 200)
    train(flags(tmp_path / "filled", data, base["llama"], *more))
    assert losses(tmp_path / "filled") == pytest.approx(losses(tmp_path / "as_they_are"), abs=1e-5)


def namespace(**changed) -> Namespace:
    return Namespace(**{"bf16": True, "fp16": False, "use_cpu": False, "deepspeed": None, "bits": 16, "fsdp": None,
                        "optim": "adamw_torch_fused", "master_weights": True} | changed)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "processes", "resharded"),
    [
        ({}, 1, True),
        ({}, 8, False),
        ({"bf16": False, "fp16": True}, 1, True),
        ({"bf16": False}, 1, None),
        ({"use_cpu": True}, 1, None),
        ({"deepspeed": "zero2.json"}, 8, None),
        ({"bits": 4}, 1, None),
        ({"optim": "adamw_bnb_8bit"}, 1, True),
        ({"optim": "adamw_bnb_8bit"}, 8, None),
        ({"optim": "adafactor"}, 1, True),
        ({"optim": "adafactor"}, 8, None),
        ({"optim": "adamw_torch_8bit"}, 8, False),
        ({"master_weights": False}, 1, None),
        ({"master_weights": False}, 8, False),
        ({"fsdp": "True"}, 8, None),
    ],
)
def test_runs_in_half_precision_on_gpus_take_one_path(changed, processes, resharded):
    added = flags_of_the_path(namespace(**changed), processes)
    if resharded is None:
        assert added == []
    else:
        assert added[:2] == ["--fsdp", "True"] and json.loads(added[3]) == {"reshard_after_forward": resharded}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", None)])
def test_the_policy_computes_in_half_precision_and_reduces_in_float32(precision, dtype):
    plugin = Namespace(fsdp_version=2, mixed_precision_policy=None, transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
    set_policy(Namespace(state=Namespace(fsdp_plugin=plugin), mixed_precision=precision), is_tied=False)
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer", "LanguageHead"]
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, None)


def test_two_processes_compute_in_bf16_as_in_float32(tmp_path, base, data):
    """Losses near float32's and not rounded; gradients of an accumulated step reduced and summed in float32."""
    more = (*RUN, *FSDP, "--gradient_accumulation_steps", "2")
    launch(2, FSDP_ON_CPU, *flags(tmp_path / "whole", data, base["llama"], *more))
    done = launch(2, FSDP_ON_CPU, *flags(tmp_path / "half", data, base["llama"], *more, "--bf16", "True"))
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    found = losses(tmp_path / "half")
    assert len(found) == 20 and found == pytest.approx(losses(tmp_path / "whole"), abs=2e-2)
    rounded = torch.tensor(found).bfloat16().tolist()
    assert sum(one == other for one, other in zip(found, rounded)) < 5
    assert seen["gradient_dtypes"] == ["torch.float32"] and seen["gradients_in_bf16"] < 0.2
