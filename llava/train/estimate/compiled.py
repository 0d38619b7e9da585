"""What torch.compile makes, on tensors without content: decoder layers, and the steps of torchao's optimizers.

A layer is one graph forward and one backward, an optimizer's step one graph for each parameter.

The graphs are those of torch's own tracing and partitioning, so what is kept for the backward pass is what a compiled
layer keeps. They are carried out operator by operator, and costed as fused (llava.train.estimate.tracker).
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class DryCompiler:
    """Stands for torch.compile in a dry run.

    Args:
        fused: a context within which operators are costed as one graph's.
        paused: a context within which they aren't counted at all: a trace isn't a step.
    """

    def __init__(self, fused: Callable[[], AbstractContextManager], paused: Callable[[], AbstractContextManager]):
        self.fused, self.paused = fused, paused

    def __call__(self, forward: Callable, **options) -> Callable:
        """`forward` of a module's class, compiled for each new set of shapes."""
        graphs: dict[tuple, Callable] = {}

        def compiled(module, *args, **kwargs):
            named = dict(module.named_parameters())
            leaves, structure = tree_flatten((args, kwargs))
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            tensors = [*named.values(), *(leaves[place] for place in places)]
            others = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor))
            shapes = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
            key = (shapes, others, structure, torch.is_grad_enabled(), module.training)
            if key not in graphs:
                rest = [None if place in set(places) else leaf for place, leaf in enumerate(leaves)]

                def run(*flat):
                    own = dict(zip(named, flat))
                    filled = list(rest)
                    for place, tensor in zip(places, flat[len(named) :], strict=True):
                        filled[place] = tensor
                    own_args, own_kwargs = tree_unflatten(filled, structure)
                    with _reparametrize_module(module, own):
                        return forward(module, *own_args, **own_kwargs)

                graphs[key] = self._compile(run)
            with self.paused():
                return graphs[key](*tensors)

        return compiled

    def _compile(self, function: Callable) -> Callable:
        from torch._inductor.decomposition import select_decomp_table

        traced: list[fx.GraphModule] = []

        def partition(joint: fx.GraphModule, *args, **kwargs):
            parts = min_cut_rematerialization_partition(joint, *args, **kwargs)
            traced.extend((joint, *parts))
            return parts

        def carry_out(gm: fx.GraphModule, example_inputs: Any) -> Any:
            return self._carry_out(gm, traced)

        return aot_function(
            function,
            fw_compiler=carry_out,
            bw_compiler=carry_out,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )

    def _carry_out(self, gm: fx.GraphModule, traced: list[fx.GraphModule]) -> Callable:
        whole = fx.Graph()
        whole.output(whole.graph_copy(gm.graph, {}))  # without the nodes that torch has taken out, but not given up
        gm = fx.GraphModule(gm, whole)
        traced.append(gm)

        def call(inputs: list):
            if traced:
                _forget_tracing(traced, inputs)
            with self.fused():
                return fx.Interpreter(gm).boxed_run(inputs)

        call._boxed_call = True  # type: ignore[attr-defined]  # takes its inputs as one list
        return call


def _forget_tracing(traced: list[fx.GraphModule], inputs: list) -> None:
    """Give up the memory of the tensors that graphs were traced with, which torch would keep: a run has none of it."""
    of_run = {one.untyped_storage()._cdata for one in inputs if isinstance(one, torch.Tensor)}
    for graph in traced:
        for node in graph.graph.nodes:
            for one in tree_leaves([*node.meta.values()]):
                if isinstance(one, torch.Tensor) and one.untyped_storage()._cdata not in of_run:
                    one.untyped_storage().resize_(0)
            node.meta.clear()
    traced.clear()
    gc.collect()


@contextmanager
def steps_carried_out(fused: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Within, optimizers of torchao carry out what they would compile, costed as one graph for each parameter."""
    if "torchao" not in sys.modules:
        yield
        return
    from torchao.optim import adam, subclass_4bit, subclass_8bit

    for levels in (subclass_4bit, subclass_8bit):  # made once in a process, and need content
        levels.get_qmap_signed()
        levels.get_qmap_unsigned()
    step = adam.single_param_adam

    def carried_out(*args):
        with fused():
            return step(*args)

    adam.single_param_adam = carried_out
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        adam.single_param_adam = step
