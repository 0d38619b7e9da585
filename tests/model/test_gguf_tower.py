"""The exported tower as llama.cpp computes it, the class token behind the patches: features are ours all the same.

The library's own are compared with in tests/real.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="the extra gguf is not installed")
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch.nn import functional

from llava.errors import LlavaError
from llava.model import load_pretrained_model
from llava.model.gguf.writer import export_gguf
from tests.model.test_gguf import DINOV2_PROCESSOR
from tests.tiny import make_chat_llava, make_clip, make_llava, make_tower


class LlamaCppTower:
    """The graph `clip_graph_llava` of llama.cpp's tools/mtmd/models/llava.cpp, with a projector of two layers.

    `first` puts the class token where its position embeddings and rows are meant for.
    """

    def __init__(self, path, first: bool = False):
        reader = GGUFReader(path)
        self.tensors = {t.name: torch.from_numpy(np.array(t.data, np.float32)) for t in reader.tensors}
        self.field = {name.removeprefix("clip."): field.contents() for name, field in reader.fields.items()}
        self.first = first

    def _linear(self, name, values):
        return functional.linear(values, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, name, values):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        epsilon = self.field["vision.attention.layer_norm_epsilon"]
        return functional.layer_norm(values, weight.shape, weight, bias, epsilon)

    def __call__(self, pixels):
        """`[3, side, side]` to `[patches, width of the language model]`."""
        weight, patch_bias = self.tensors["v.patch_embd.weight"], self.tensors.get("v.patch_embd.bias")
        patches = functional.conv2d(pixels[None], weight, patch_bias, stride=weight.shape[-1])[0].flatten(1).T
        parts = [patches, self.tensors["v.class_embd"][None]]
        hidden = torch.cat(parts[::-1] if self.first else parts) + self.tensors["v.position_embd.weight"]
        if "v.pre_ln.weight" in self.tensors:
            hidden = self._norm("v.pre_ln", hidden)
        layers, kept = self.field["vision.feature_layer"], []
        for block in range(max(layers)):
            if block in layers:
                kept.append(hidden)
            hidden = self._block(f"v.blk.{block}.", hidden)
        seen = torch.cat([*kept, hidden], 1)[1:]
        return self._linear("mm.2", functional.gelu(self._linear("mm.0", seen)))

    def _block(self, prefix, hidden):
        heads = self.field["vision.attention.head_count"]
        normed = self._norm(prefix + "ln1", hidden)
        query, key, value = (
            self._linear(f"{prefix}attn_{part}", normed).unflatten(1, (heads, -1)).transpose(0, 1) for part in "qkv"
        )
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)
        hidden = hidden + self._linear(prefix + "attn_out", mixed)
        inner = self._linear(prefix + "ffn_up", self._norm(prefix + "ln2", hidden))
        inner = functional.gelu(inner) if self.field["use_gelu"] else inner * torch.sigmoid(1.702 * inner)
        return hidden + self._linear(prefix + "ffn_down", inner)


def uneven(tower, seed=3):
    """Norms, biases and positions as training leaves them: none is one, zero or the same everywhere."""
    torch.manual_seed(seed)
    path = tower / "model.safetensors"
    weights = load_file(path)
    for name, value in weights.items():
        if value.ndim == 1 or "position" in name or "cls" in name or "class" in name:
            value += torch.randn(value.shape) * 0.3
    for name in [name for name in weights if "fc2.bias" in name]:
        weights[name][5] += 20  # a value far larger than the others, as large models have
    save_file(weights, path, {"format": "pt"})
    return tower


CASES = {
    "clip": (lambda folder: make_clip(folder, image_size=112, hidden_act="gelu"), {}),
    "clip, quick gelu": (lambda folder: make_clip(folder, image_size=42), {}),
    "dinov2": (
        lambda folder: make_tower(
            folder, "dinov2", DINOV2_PROCESSOR, image_size=70, layerscale_value=0.3, qkv_bias=True
        ),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_features_of_a_tower_with_a_class_token(case, tmp_path):
    make, fields = CASES[case]
    llava, _ = make_chat_llava(tmp_path, tower=uneven(make(tmp_path / "tower")), **fields)
    compare(llava, tmp_path)


def test_features_through_a_linear_projector(tmp_path):
    compare(make_llava(tmp_path, mm_projector_type="linear"), tmp_path)


def compare(llava, folder):
    loaded = load_pretrained_model(llava, device="cpu", dtype="float32")
    side = loaded.model.get_vision_tower().image_size
    torch.manual_seed(0)
    images = [torch.randn(3, side, side), torch.randn(3, 1, 1).expand(3, side, side), torch.zeros(3, side, side)]
    images.append(torch.linspace(-2, 2, side).expand(3, side, side))
    files = {token: export_gguf(llava, folder / token, kind="f32", class_token=token) for token in ("first", "last")}
    towers = {token: LlamaCppTower(path / "mmproj-f32.gguf", token == "first") for token, path in files.items()}
    wrong = LlamaCppTower(files["first"] / "mmproj-f32.gguf")
    for image in images:
        with torch.inference_mode():
            ours = loaded.model.encode_images(image[None])[0]
            for token, tower in towers.items():
                cosines = functional.cosine_similarity(tower(image), ours)
                assert cosines.min() > (0.999 if token == "last" else 0.99999), token
                torch.testing.assert_close(tower(image), ours, atol=0.02 * float(ours.abs().max()), rtol=0)
    # What is written for the class token in front doesn't do where it is behind.
    assert functional.cosine_similarity(wrong(images[0]), loaded.model.encode_images(images[0][None])[0]).min() < 0.99


def test_features_of_no_block_are_refused(tmp_path):
    llava = make_llava(tmp_path, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=0)
    with pytest.raises(LlavaError, match="no block of the tower"):
        export_gguf(llava, tmp_path / "gguf")
