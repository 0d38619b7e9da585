"""Makers of the base models: tokenizer, optimizer, tower loss."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional

from llava.demo import language_model, tokenizer, tower
from llava.demo.fitting import LOSSES, own_part, shuffled, warm_cosine
from llava.demo.language_model import in_order
from llava.demo.muon import Muon, orthogonal
from llava.demo.tokenizer import make_tokenizer
from llava.demo.tower import caption_sentences, exclusions, mirror_columns
from llava.demo.tower_model import SentenceMatching, match_loss, start_embeddings
from llava.errors import LlavaError
from llava.model import load_tokenizer
from llava.records import read_json, write_json

CAPTIONS = ["This is a scan. It is on the left side.", "This is a scan. It is on the right side."]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(CAPTIONS * 20, folder)
    return folder


def test_tokenizer_knows_its_words_and_says_any_text(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [1, 2]
    ids = tokenizer("It is on the left side.", add_special_tokens=False)["input_ids"]
    assert len(ids) == 7, "a token per word and mark"
    for text in ("It is on the left side.", "Üben: 東京, 😀!", "two  blanks\nand a line"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_orthogonal_gives_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 16, 40)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_reaches_a_matrix_of_either_shape():
    torch.manual_seed(0)
    targets = [torch.randn(8, 20), torch.randn(20, 8)]
    weights = [torch.nn.Parameter(torch.zeros_like(target)) for target in targets]
    optimizer = Muon(weights, lr=0.2, weight_decay=0.0)
    losses = []
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.2 * warm_cosine(step, 80)
        optimizer.zero_grad()
        loss = sum((weight - target).square().mean() for weight, target in zip(weights, targets))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_schedule_rises_and_falls():
    rates = [warm_cosine(step, 200) for step in range(200)]
    assert rates[0] < 0.2 and max(rates) == pytest.approx(1.0, abs=0.02) and rates[-1] < 0.02


def test_batches_show_every_sample_once_per_round():
    batches = shuffled(12, 4, seed=0)
    first, second = [torch.cat([next(batches) for _ in range(3)]).tolist() for _ in range(2)]
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_processes_share_a_batch():
    assert list(own_part([[1, 2, 3], [4]])) == [[1, 2, 3], [4]]


def test_text_is_read_once_in_order_in_batches_of_little_padding():
    lengths = [5, 90, 7, 60, 8, 30] * 100
    batches = in_order(lengths, 400, seed=0)
    assert sorted(number for batch in batches for number in batch) == list(range(600))
    assert all(len(batch) > 1 for batch in batches)
    assert max(number for batch in batches[:5] for number in batch) < 128, "from beginning to end"
    padded = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


def test_sentences_of_captions_and_of_mirrored_images():
    sentences, captions = caption_sentences([*CAPTIONS, "This is a scan."])
    assert [[sentences[number] for number in caption] for caption in captions[1:]] == [
        ["This is a scan.", "It is on the right side."],
        ["This is a scan.", "This is a scan."],
    ]
    swapped = mirror_columns(sentences)
    left, right = (sentences.index(f"It is on the {side} side.") for side in ("left", "right"))
    assert swapped[left] == right and swapped[right] == left
    same = sentences.index("This is a scan.")
    assert swapped[same] == same
    assert exclusions(captions, 3).nonzero().tolist() == [[0, 1], [1, 0]]


def test_match_loss_contrasts_only_what_excludes():
    excludes = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    said = torch.tensor([[0, 2]])

    def loss(*logits):
        return match_loss(torch.tensor(logits).expand(1, 2, 3), said, excludes)

    assert loss(9.0, -9.0, 0.0) < 1e-3 and loss(-9.0, 9.0, 0.0) > 8
    assert loss(9.0, -9.0, 50.0) == pytest.approx(loss(9.0, -9.0, 0.0).item(), abs=1e-6)


def test_tower_learns_which_side_is_bright():
    torch.manual_seed(0)
    sentences, captions = caption_sentences(CAPTIONS)
    args = SimpleNamespace(hidden_size=32, layers=1, image_size=32, patch_size=16)
    model = SentenceMatching(args, torch.eye(len(sentences)), exclusions(captions, len(sentences)))
    sides = torch.randint(0, 2, (64,))
    images = 0.3 * torch.randn(64, 3, 32, 32)
    for image, side in zip(images, sides):
        image[..., 16 * side : 16 * side + 16] += 1
    start_embeddings(model.tower, images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(images, captions[sides])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    said = model.said(captions[sides], 5)
    found = model.match(images).masked_fill(~(model.excludes[said] | functional.one_hot(said, 3).bool()), -torch.inf)
    told = said != sentences.index("This is a scan.")
    assert (found.argmax(-1) == said)[told].float().mean() > 0.95, "every second token says the side"


def test_the_commands_one_after_the_other(tmp_path):
    Image.new("L", (40, 40), 90).save(tmp_path / "x.png")
    turns = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}] for text in CAPTIONS]
    write_json(tmp_path / "records.json", [{"image": "x.png", "conversations": two} for two in turns * 20])
    data, sizes = ["--data-path", str(tmp_path / "records.json")], ["--hidden-size", "32", "--layers", "1"]
    lengths, folder = {}, {name: str(tmp_path / name) for name in ("few", "many", "language", "tower")}
    for name, learned in (("few", 20), ("many", 100)):
        tokenizer.main([*data, "--output-dir", folder[name], "--learned", str(learned)])
        lengths[name] = len(load_tokenizer(folder[name]))
    assert lengths["few"] < lengths["many"]
    words = [*data, *sizes, "--tokenizer", folder["many"], "--output-dir", folder["language"], "--processes", "1"]
    steps = {}
    for tokens in (200, 4000):
        language_model.main([*words, "--batch-tokens", str(tokens), "--overwrite"])
        steps[tokens] = len(read_json(tmp_path / "language" / LOSSES))
    assert steps[200] > steps[4000] == 1
    words = [*data, *sizes, "--image-folder", str(tmp_path), "--language-model", folder["language"], "--steps", "3"]
    tower.main([*words, "--output-dir", folder["tower"], "--image-size", "32", "--batch-size", "4", "--processes", "1"])
    assert len(read_json(tmp_path / "tower" / LOSSES)) == 3
    assert read_json(tmp_path / "tower" / "config.json")["image_size"] == 32


def test_records_are_read_as_everywhere_and_a_bad_one_is_named(tmp_path):
    """Whatever they call their turns; from processes of its own too a command ends with one line."""
    data = ["--data-path", str(tmp_path / "records.json")]
    turns = [{"role": "user", "content": "<image>Say it."}, {"role": "assistant", "content": "A scan."}]
    write_json(tmp_path / "records.json", [{"messages": turns}])
    assert tokenizer.texts_of(data[1:])[-2:] == ["Say it.", "A scan."]
    write_json(tmp_path / "records.json", [{"messages": turns}, {"text": "A scan."}])
    folder = ["--output-dir", str(tmp_path / "out")]
    for main, words in (
        (tokenizer.main, []),
        (tower.main, ["--image-folder", str(tmp_path), "--language-model", str(tmp_path), "--processes", "2"]),
    ):
        with pytest.raises(LlavaError, match=r"records.json record 1: the record has no .conversations."):
            main([*data, *folder, *words])
    with pytest.raises(LlavaError, match="--processes 0: give 1 or more"):
        tower.main([*data, *folder, "--image-folder", "x", "--language-model", "x", "--processes", "0"])
    write_json(tmp_path / "records.json", [{"messages": turns, "images": ["a.png", "b.png"]}])
    with pytest.raises(LlavaError, match="record 0: a caption is of one image, named by its path; here are 2"):
        tower.main([*data, *folder, "--image-folder", "x", "--language-model", "x", "--processes", "1"])
    assert not (tmp_path / "out").exists()


def test_few_samples_of_the_base_models():
    from llava.demo.fitting import shuffled
    from llava.demo.language_model import in_order

    assert min(map(len, in_order([10] * 129, 3600, 0))) >= 2  # each of two processes has its part
    with pytest.raises(LlavaError, match="give no batch"):
        next(shuffled(10, 32, 0))
