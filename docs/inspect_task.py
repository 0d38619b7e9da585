"""Closed questions of a VQA file as an inspect_ai task, asked through the API, scored by the *strict* set.

OPENAI_API_KEY=none inspect eval docs/inspect_task.py --model openai/vqa --model-base-url http://127.0.0.1:8000/v1 \
    -T questions=runs/demo/data/vqa_test.json -T images=runs/demo/data/images
"""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText
from inspect_ai.scorer import Score, accuracy, scorer

from llava.data.vqa_items import read_vqa_items
from llava.eval.metrics import CLOSED, strict_item


@scorer(metrics=[accuracy()])
def strict():
    async def score(state, target):
        said = state.output.completion
        return Score(value=strict_item(said, target.text, state.metadata["question"]).correct, answer=said)

    return score


@task
def closed_questions(questions: str, images: str, count: int = 200):
    samples = []
    for item in read_vqa_items(questions):
        if item.answer_type == CLOSED:
            content = [ContentImage(image=f"{images}/{item.image}"), ContentText(text=item.question)]
            asked = [ChatMessageUser(content=content)]
            samples.append(Sample(asked, id=item.id, target=item.answer, metadata={"question": item.question}))
    return Task(dataset=samples[:count], scorer=strict())
