"""The engine's answers: those of transformers' own generation, whatever is answered at the same time."""

import pytest
import torch
from PIL import ExifTags, Image

from llava.errors import LlavaError
from llava.generation import ContextTooLong, Engine, OutOfMemory, Request, SamplingParams
from tests.generation.conftest import answer_alone, ask, assert_same, mixed_requests


def test_batched_answers_are_those_of_single_generation(loaded, images):
    requests = mixed_requests(images)
    engine = Engine(loaded)
    answers = engine.generate(requests)
    assert [answer.id for answer in answers] == [request.id for request in requests]
    assert engine.statistics()["cached_tokens"] > 0
    for request, answer in zip(requests, answers):
        expected, margins = answer_alone(loaded, engine, request)
        assert_same(expected, margins, answer.token_ids)
        assert answer.prompt_tokens == len(engine.prompts.build(request))
        assert answer.finish_reason in ("stop", "length")
        assert answer.text == loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("options", [{"max_batch_size": 3}, {"max_prefill": 40}, {"prefix_bytes": 0}])
def test_answers_do_not_depend_on_how_they_were_batched(llama, images, options):
    requests = mixed_requests(images)
    engine = Engine(llama)
    together = engine.generate(requests)
    for request, answer, other in zip(requests, together, Engine(llama, **options).generate(requests)):
        assert_same(answer.token_ids, answer_alone(llama, engine, request)[1], other.token_ids)


def test_sliding_window(llama, images, monkeypatch):
    """Mistral-7B v0.1 sees 4096 positions back; here it is 20."""
    monkeypatch.setattr(llama.model.config, "sliding_window", 20, raising=False)
    requests = [ask("left right " * 12, [images[0]]), ask("Is there a fracture?")]
    answers = Engine(llama).generate(requests)
    engine = Engine(llama)
    for request, answer in zip(requests, answers):
        prompt = engine.prompts.build(request)
        ids = [*prompt.ids.tolist(), *answer.token_ids]
        features = engine.encoder.features(prompt.images)
        with torch.inference_mode():
            embeds = llama.model.embed_inputs(
                torch.tensor([ids]), image_features=torch.cat(features) if features else None
            )
            places = torch.arange(len(ids))
            mask = (places[None] <= places[:, None]) & (places[None] > places[:, None] - 20)
            logits = llama.model(inputs_embeds=embeds, attention_mask=mask[None, None]).logits[0]
        expected = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert expected == answer.token_ids


def test_each_image_is_opened_and_encoded_once(llama, tmp_path, images, monkeypatch):
    from llava.generation import image_features as module

    opened = []
    monkeypatch.setattr(module, "open_image", lambda source, **options: opened.append(source) or original(source))
    from llava.images import open_image as original

    for index, image in enumerate(images[:2]):
        image.save(tmp_path / f"{index}.png")
    requests = [ask(f"Question {index}?", [tmp_path / f"{index % 2}.png"]) for index in range(12)]
    engine = Engine(llama, max_batch_size=4)
    engine.generate(requests)
    assert len(opened) == 2
    assert engine.statistics()["images_encoded"] == 2
    engine.generate(requests)
    assert len(opened) == 2


def test_what_prompts_have_in_common_is_computed_once(llama, images):
    requests = [ask(f"Is there {word}?", [images[0]]) for word in ("a fracture", "a nodule", "no", "left")]
    engine = Engine(llama)
    engine.generate(requests)
    prompts = [engine.prompts.build(request) for request in requests]
    shared = prompts[0].spans[-1][1]
    assert engine.statistics()["cached_tokens"] == 3 * shared
    # More than a batch of them: what is still to come finds it, too.
    engine = Engine(llama, max_batch_size=2)
    engine.generate(requests)
    assert engine.statistics()["cached_tokens"] == 3 * shared


def test_the_next_turn_goes_on_where_the_last_one_ended(llama, images):
    engine = Engine(llama)
    first = ask("What does the picture show?", [images[0]])
    (answer,) = [piece for piece in [engine.submit(first)] if list(piece)]
    conversation = first.conversation.copy()
    conversation.append_message(conversation.roles[1], answer.answer.text)
    conversation.append_message(conversation.roles[0], "Is it left?")
    second = Request(conversation, [images[0]], SamplingParams(max_new_tokens=8))
    handle = engine.submit(second)
    list(handle)
    assert handle.answer.cached_tokens > answer.answer.prompt_tokens - 8
    expected, margins = answer_alone(llama, Engine(llama), second)
    assert_same(expected, margins, handle.answer.token_ids)


def test_another_image_in_the_same_place_is_another_prompt(llama, images):
    engine = Engine(llama)
    for image in images[:3]:
        request = ask("What is it?", [image])
        handle = engine.submit(request)
        list(handle)
        expected, margins = answer_alone(llama, Engine(llama), request)
        assert_same(expected, margins, handle.answer.token_ids)


def test_the_same_pixels_in_other_colours_or_turned_are_another_image(llama):
    def drawn(palette=(0, 0, 0, 255, 0, 0), orientation=1, **info):
        image = Image.new("P", (8, 4), 1)
        image.putpalette(palette)
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image.info.update(info)
        return image

    others = [drawn(), drawn((0, 0, 0, 0, 0, 255)), drawn(orientation=6), drawn(transparency=1)]
    encoder = Engine(llama).encoder
    assert len({encoder.identify(image).digest for image in others}) == len(others)
    assert encoder.identify(drawn()).digest == encoder.identify(others[0]).digest


def test_prompts_as_text_and_as_ids(llama, images):
    engine = Engine(llama)
    text = "USER: <image>\nWhat is it? ASSISTANT:"
    ids = llama.tokenizer("USER: ")["input_ids"] + [-200] + llama.tokenizer("a?")["input_ids"][1:]
    sampling = SamplingParams(max_new_tokens=4)
    for conversation in (text, ids):
        (answer,) = engine.generate([Request(conversation, [images[0]], sampling)])
        expected, margins = answer_alone(llama, engine, Request(conversation, [images[0]], sampling))
        assert_same(expected, margins, answer.token_ids)


def test_stop_strings_end_the_answer(llama, images):
    request = ask("What is it?", [images[1]], max_new_tokens=30)
    (whole,) = Engine(llama).generate([request])
    middle = whole.text[len(whole.text) // 3 : len(whole.text) // 3 + 2]
    (answer,) = Engine(llama).generate([ask("What is it?", [images[1]], max_new_tokens=30, stop=middle)])
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(middle)].strip()
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]


def test_end_marks_of_the_template_and_ignore_eos(llama):
    engine = Engine(llama)
    prompt = engine.prompts.build(ask("Hi"))
    assert prompt.stop_ids == {llama.tokenizer.eos_token_id}
    assert engine.prompts.build(ask("Hi", template="llava_v0")).stop_strings == ("###",)
    assert engine.prompts.build(ask("Hi", stop=("x",), ignore_eos=True)).stop_ids == frozenset()
    (answer,) = engine.generate([ask("Hi", ignore_eos=True, max_new_tokens=25)])
    assert len(answer.token_ids) == 25 and answer.finish_reason == "length"


def test_a_seed_gives_the_same_answer_in_any_company(llama, images):
    request = ask("What is it?", [images[0]], temperature=1.5, seed=7, max_new_tokens=16)
    (alone,) = Engine(llama).generate([request])
    others = mixed_requests(images, temperature=0.9, seed=3)
    found = Engine(llama).generate([*others[:5], request, *others[5:]])[5]
    assert found.token_ids == alone.token_ids
    different = Engine(llama).generate(
        [ask("What is it?", [images[0]], temperature=1.5, seed=seed, max_new_tokens=16) for seed in range(6)]
    )
    assert len({tuple(answer.token_ids) for answer in different}) > 1


def test_logprobs_are_the_models(llama, images):
    request = ask("What is it?", [images[0]], logprobs=3, max_new_tokens=5)
    engine = Engine(llama)
    answer, _ = engine.generate([request, ask("Hi")])
    prompt = engine.prompts.build(request)
    ids = torch.tensor([[*prompt.ids.tolist(), *answer.token_ids]])
    with torch.inference_mode():
        features = torch.cat(engine.encoder.features(prompt.images))
        scores = llama.model(input_ids=ids, image_features=features).logits[0, len(prompt) - 1 :].log_softmax(-1)
    assert len(answer.logprobs) == len(answer.token_ids) == 5
    for place, (token, found) in enumerate(zip(answer.token_ids, answer.logprobs)):
        assert found.token_id == token
        assert found.logprob == pytest.approx(float(scores[place, token]), abs=1e-4)
        assert [entry[2] for entry in found.top] == pytest.approx(scores[place].topk(3).values.tolist(), abs=1e-4)
        assert found.top[0][0] == token


def test_beam_search_is_transformers_own(llama, images):
    request = ask("What is it?", [images[0]], num_beams=3, max_new_tokens=6)
    engine = Engine(llama)
    answer, other = engine.generate([request, ask("Hi")])
    prompt = engine.prompts.build(request)
    ids = torch.from_numpy(prompt.ids)[None]
    with torch.inference_mode():
        embeds = llama.model.embed_inputs(ids, image_features=torch.cat(engine.encoder.features(prompt.images)))
        expected = llama.model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=6, do_sample=False,
            eos_token_id=2, pad_token_id=2,
        )[0].tolist()  # fmt: skip
    assert answer.token_ids == expected[: expected.index(2) if 2 in expected else None]
    assert other.token_ids


def test_a_prompt_that_leaves_no_room_names_the_lengths(llama, images):
    engine = Engine(llama)
    request = ask("left right " * 300, id="q17")
    with pytest.raises(ContextTooLong, match=r"q17.* positions and the model's context is 512"):
        engine.generate([ask("Hi"), request])
    with pytest.raises(ContextTooLong):
        engine.submit(request)
    # An answer that reaches the end of the context ends there.
    nearly = ask("left right " * 100, max_new_tokens=1000, ignore_eos=True)
    (answer,) = engine.generate([nearly])
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + len(answer.token_ids) == 512


def test_images_and_placeholders_have_to_match(llama, images, tmp_path):
    engine = Engine(llama)
    with pytest.raises(LlavaError, match=r"'x'.*the text has 1 <image> for 2 images"):
        engine.generate([Request("<image> a", images[:2], id="x")])
    with pytest.raises(LlavaError, match=r"not found: .*none\.png"):
        engine.generate([ask("What?", [tmp_path / "none.png"])])
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(LlavaError, match=r"bad\.png"):
        engine.generate([ask("Hi"), ask("What?", [tmp_path / "bad.png"])])
    assert engine.scheduler.is_idle
    assert engine.generate([ask("Hi")])[0].token_ids


def test_wrong_sampling_parameters():
    wrong = [
        {"temperature": -1}, {"top_p": -0.1}, {"top_p": 1.2}, {"max_new_tokens": 0}, {"stop": ("",)}, {"logprobs": 99},
        {"num_beams": 0}, {"num_beams": 2, "temperature": 1.0}, {"num_beams": 2, "repetition_penalty": 1.1},
        {"temperature": float("nan")}, {"temperature": float("inf")}, {"logit_bias": {1: float("nan")}},
        {"stop": ("\ud800",)}, {"top_k": -2}, {"seed": True}, {"top_p": "1"}, {"no_such": 1},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(LlavaError, match=next(iter(settings))):
            SamplingParams(**settings)


def test_neutral_values_of_others():
    neutral = {
        "top_k": -1,
        "repetition_penalty": 1,
        "stop": None,
        "seed": None,
        "logit_bias": None,
        "temperature": None,
    }
    assert SamplingParams(**neutral) == SamplingParams(stop=()) == SamplingParams()


def test_ids_that_end_an_answer_and_ids_of_no_vocabulary(llama):
    engine = Engine(llama)
    (plain,) = engine.generate([ask("What is it?", max_new_tokens=8, ignore_eos=True)])
    end = plain.token_ids[3]
    (answer,) = engine.generate([ask("What is it?", max_new_tokens=8, ignore_eos=True, stop_token_ids=[end])])
    assert answer.token_ids == plain.token_ids[: plain.token_ids.index(end)] and answer.finish_reason == "stop"
    for wrong in ({"stop_token_ids": [10**6]}, {"logit_bias": {10**6: 1}}):
        with pytest.raises(LlavaError, match=f"{next(iter(wrong))}: 1000000 is no id"):
            engine.submit(ask("What is it?", **wrong))


def test_a_text_that_no_context_holds_is_refused_before_it_is_tokenised(llama, monkeypatch):
    engine = Engine(llama)
    monkeypatch.setattr(engine.prompts, "_tokenize", lambda _: pytest.fail("tokenised"))
    with pytest.raises(ContextTooLong, match="characters"):
        engine.submit(ask("left right " * 1_000_000))


def test_a_penalty_holds_whatever_else_is_answered(llama, images):
    """Each row's rule sees its own prompt and answer, also when it waits for memory and goes on."""
    settings = {"temperature": 0.8, "top_k": 50, "repetition_penalty": 1.3, "seed": 5, "ignore_eos": True}
    request = ask("What is it?", [images[0]], max_new_tokens=40, **settings)
    (alone,) = Engine(llama).generate([request])
    others = mixed_requests(images, max_new_tokens=100, ignore_eos=True)
    per_position = Engine(llama).scheduler.runner.cache.bytes_per_position
    engine = Engine(llama, cache_bytes=per_position * 64 * 10)
    together = engine.generate([*others[:4], request, *others[4:]])
    assert engine.statistics()["preempted"] > 0
    assert together[4].token_ids == alone.token_ids
    settings["repetition_penalty"] = 1
    (without,) = Engine(llama).generate([ask("What is it?", [images[0]], max_new_tokens=40, **settings)])
    assert without.token_ids != alone.token_ids


def test_little_memory_means_waiting_not_failing(llama, images):
    requests = mixed_requests(images, max_new_tokens=100, ignore_eos=True)
    plenty = Engine(llama).generate(requests)
    per_position = Engine(llama).scheduler.runner.cache.bytes_per_position
    engine = Engine(llama, cache_bytes=per_position * 64 * 10)
    answers = engine.generate(requests)
    reference = Engine(llama)
    for request, one, other in zip(requests, plenty, answers):
        assert len(other.token_ids) == 100
        assert_same(one.token_ids, answer_alone(llama, reference, request)[1], other.token_ids)
    assert engine.statistics()["preempted"] > 0


def test_a_request_that_outgrows_memory_alone_goes_on(llama):
    request = ask("Go on?", max_new_tokens=300, ignore_eos=True)
    expected = Engine(llama).generate([request])[0].token_ids
    engine = Engine(llama)
    short = len(engine.prompts.build(request)) + 70
    room = -(-short // 64) * 64 * engine.scheduler.runner.bytes_per_position
    engine = Engine(llama, prefix_bytes=0, cache_bytes=room)
    assert engine.generate([request])[0].token_ids == expected and len(expected) == 300


def test_a_request_beyond_all_memory_is_refused(llama):
    per_position = Engine(llama).scheduler.runner.cache.bytes_per_position
    engine = Engine(llama, cache_bytes=per_position * 64)
    with pytest.raises(OutOfMemory, match="cache_bytes"):
        engine.generate([ask("left right " * 100)])
    assert engine.generate([Request("Hi", (), SamplingParams(max_new_tokens=3))])[0].token_ids


@pytest.mark.parametrize("already_running", [0, 2])
def test_out_of_memory_on_the_device_hits_only_who_needs_it(llama, images, monkeypatch, already_running):
    """More than four prompts in one pass don't fit; one of them never does; who runs goes on."""
    engine = Engine(llama)
    runner = engine.scheduler.runner
    original = runner.run

    def run(rows, tokens, prompts):
        if len(prompts) > 4 or any(prompt.request.id == 3 for prompt in prompts):
            raise torch.OutOfMemoryError("full")
        return original(rows, tokens, prompts)

    monkeypatch.setattr(runner, "run", run)
    requests = mixed_requests(images, count=9)
    handles = [engine.submit(request) for request in requests[:already_running]]
    engine.scheduler.step()
    assert len(engine.scheduler.running) == already_running
    handles += [engine.submit(request) for request in requests[already_running:]]
    for handle, request in zip(handles, requests):
        if request.id == 3:
            with pytest.raises(OutOfMemory):
                list(handle)
        else:
            list(handle)
            expected, margins = answer_alone(llama, Engine(llama), request)
            assert_same(expected, margins, handle.answer.token_ids)


def test_no_memory_for_keeping_a_prefix_changes_no_answer(llama, images, monkeypatch):
    engine = Engine(llama)

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(engine.scheduler.runner.cache, "save", full)
    requests = mixed_requests(images, count=9)
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        engine.scheduler.step()
    for handle, request in zip(handles, requests):
        list(handle)
        expected, margins = answer_alone(llama, Engine(llama), request)
        assert_same(expected, margins, handle.answer.token_ids)
    assert not len(engine.scheduler.prefixes)


def test_a_beam_search_without_memory_ends_alone(llama, monkeypatch):
    from llava.generation import scheduler

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(scheduler, "beam_search", full)
    engine = Engine(llama)
    first, beams = engine.submit(ask("Hi", max_new_tokens=4)), engine.submit(ask("Hi", num_beams=2))
    list(first)
    with pytest.raises(OutOfMemory):
        list(beams)


def test_who_was_in_a_step_that_failed_waits_again(llama, monkeypatch):
    """Without a thread of the engine's own the error goes to whoever drove the step; the others ask again."""
    engine = Engine(llama)
    handles = [engine.submit(ask("Hi", max_new_tokens=4, ignore_eos=True)) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler.runner, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            list(handles[0])
    for handle in handles:
        list(handle)
        assert len(handle.answer.token_ids) == 4


def test_empty_list(llama):
    assert Engine(llama).generate([]) == []


def test_weights_and_attention_of_the_model_stay_as_they_are(llama):
    before = llama.model.config._attn_implementation
    Engine(llama).generate([ask("Hi")])
    assert llama.model.config._attn_implementation == before


def test_features_of_images_share_the_budget(llama):
    """A small budget is small for everything: features counted with what holds them, none kept beyond it."""
    engine = Engine(llama, cache_bytes=400_000)
    assert engine.encoder.max_bytes == 100_000
    images = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in range(100)]
    engine.generate([ask("Which?", [image], max_new_tokens=1) for image in images])
    assert 0 < len(engine.encoder._features) <= 100_000 // 1500
    assert Engine(llama, cache_bytes=64 << 30).encoder.max_bytes == 512 << 20
