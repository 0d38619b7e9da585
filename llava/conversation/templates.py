"""The templates of LLaVA-Med v1.0 and v1.5, of LLaVA (BabyDoctor's too) and of chat models, by name and by release.

The releases disagree on a few names (`v1`, `llava_v1`, ...). A plain name has one meaning, `_CANONICAL`'s;
`release/name`, such as `llava_med_v1.0/llava_v1`, means that release's and no other.
"""

from dataclasses import replace

from llava.conversation.rendering import Conversation, SeparatorStyle
from llava.errors import LlavaError

V1_0, V1_5, LLAVA, QWEN, CHAT_MODELS = "llava_med_v1.0", "llava_med_v1.5", "llava", "qwen", "chat_models"


def get_template(name: str | None, release: str | None = None) -> Conversation:
    """A fresh conversation of the template `name` (or `release/name`), without any turn of the user's.

    Args:
        name: None is refused: it is a configuration's that names none.
        release: one of `RELEASES`; None takes the canonical template of that name.

    Raises:
        LlavaError: unknown name or release; the message lists the known ones.
    """
    if name is None:
        raise LlavaError(
            f"the model's configuration names no prompt template; name one of {', '.join(template_names())}"
        )
    if release is None and "/" in name:
        release, name = name.rsplit("/", 1)
    if release is None:
        if name not in conv_templates:
            raise LlavaError(f'unknown prompt template "{name}"; known: {", ".join(template_names())}')
        return conv_templates[name].copy()
    if release not in _BY_RELEASE:
        raise LlavaError(f'unknown release "{release}" of prompt templates; known: {", ".join(RELEASES)}')
    if name not in _BY_RELEASE[release]:
        known = ", ".join(template_names(release))
        raise LlavaError(f'unknown prompt template "{name}" in release {release}; known: {known}')
    return _BY_RELEASE[release][name].copy()


def template_names(release: str | None = None) -> list[str]:
    """The names that `get_template` takes: a release's, or the canonical ones (qualified names left out)."""
    return sorted(_BY_RELEASE[release] if release else (name for name in conv_templates if "/" not in name))


_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_HUMAN_SYSTEM = f"A chat between a curious human and an artificial intelligence assistant. {_POLITE.format('human')}"
_USER_SYSTEM = f"A chat between a curious user and an artificial intelligence assistant. {_POLITE.format('user')}"
_MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using natural "
    "language.The visual content will be provided with the following format: <Image>visual content</Image>."
)
_MED = (
    "You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at Microsoft, "
    "based on the general domain LLaVA architecture."
)
_MED_VISION = (
    f"{_MED}You are able to understand the visual content that the user provides, and assist the user with a "
    "variety of medical and clinical {} using natural language.Follow the instructions carefully and explain your "
    "answers in detail."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_RENEWABLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_RENEWABLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)
_GREETING = "Hi there!  How can I help you today?\n"


def _hash(system: str, *examples: str, version: str = "Unknown") -> Conversation:
    roles = ("Human", "Assistant")
    messages = [[roles[index % 2], text] for index, text in enumerate(examples)]
    return Conversation(system, roles, messages, len(messages), version=version)


def _two(system: str, roles: tuple[str, str] = ("USER", "ASSISTANT"), version: str = "v1") -> Conversation:
    return Conversation(system, roles, sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>", version=version)


def _llama_2(system: str, sep: str = "<s>") -> Conversation:
    return Conversation(
        system, ("USER", "ASSISTANT"), sep_style=SeparatorStyle.LLAMA_2, sep=sep, sep2="</s>", version="llama_v2"
    )


def _marked(mark: str, system: str, sep: str, sep2: str | None = None, version: str = "mpt") -> Conversation:
    """A format with a mark before each turn; `mark` has {} for who speaks."""
    roles = (mark.format("user"), mark.format("assistant"))
    template = Conversation("", roles, sep_style=SeparatorStyle.MPT, sep=sep, sep2=sep2, version=version)
    if system:
        template.set_system(system)
    return template


def _mpt(system: str) -> Conversation:
    return _marked("<|im_start|>{}\n", system, "<|im_end|>")


def _chatml(system: str, version: str) -> Conversation:
    """ChatML as chat templates write it: a line break after each end mark, which alone ends an answer."""
    return _marked("<|im_start|>{}\n", system, "<|im_end|>\n", "<|im_end|>", version)


_DEFAULT = _hash(_HUMAN_SYSTEM, _RENEWABLE_QUESTION, _RENEWABLE_ANSWER)
_VICUNA = _two(_USER_SYSTEM)
_PLAIN = Conversation("", ("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")
_DIRECT = _mpt("Answer the questions.")

_LLAVA_TEMPLATES = {
    "default": _DEFAULT,
    "v0": _DEFAULT,
    "v1": _VICUNA,
    "vicuna_v1": _VICUNA,
    "llama_2": _llama_2(_LLAMA_2_SYSTEM),
    "mistral_instruct": _llama_2("", sep=""),
    "chatml_direct": _DIRECT,
    "mistral_direct": _DIRECT,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": _hash(_HUMAN_SYSTEM),
    "v0_mmtag": _hash(_MMTAG_SYSTEM, version="v0_mmtag"),
    "llava_v1": _two(_HUMAN_SYSTEM),
    "v1_mmtag": _two(_MMTAG_SYSTEM, version="v1_mmtag"),
    "llava_llama_2": _llama_2(_LLAVA_LLAMA_2_SYSTEM),
    "mpt": _mpt(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
}
_MED_1_5_TEMPLATES = {
    name: replace(template, strip_turns=template.sep_style is SeparatorStyle.TWO)
    for name, template in _LLAVA_TEMPLATES.items()
    if not name.endswith("_direct")
}
_MED_1_0_TEMPLATES = {
    name: replace(template, image_first=False)
    for name, template in {
        "default": _DEFAULT,
        "simple": _hash(_HUMAN_SYSTEM, "Hi!", _GREETING),
        "simple_legacy": _hash(
            f"{_MED}You are designed to assist human with a variety of medical and clinical research tasks using "
            "natural language.Follow the instructions carefully.",
            "Hi!\n\n### Response:",
            _GREETING,
        ),
        "multimodal": _hash(_MED_VISION.format("tasks"), "Hi!", _GREETING),
        "llava_v1": _two(_MED_VISION.format("research tasks")),
        "v1": _DEFAULT,
        "bair_v1": _two("BEGINNING OF CONVERSATION:", ("USER", "GPT"), version="Unknown"),
        "vicuna_v1_1": _VICUNA,
    }.items()
}
_FAMILIES_OWN = {
    QWEN: {"qwen2": _chatml("You are a helpful assistant.", "qwen2")},
    CHAT_MODELS: {
        "chatml": _chatml("", "chatml"),
        "smollm2": _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face", "chatml"),
        "llama_3": _marked("<|start_header_id|>{}<|end_header_id|>\n\n", "", "<|eot_id|>", version="llama_3"),
    },
}
"""Formats that language models were trained with; one without a system text has no turn for it."""

_RELEASES = {V1_0: _MED_1_0_TEMPLATES, V1_5: _MED_1_5_TEMPLATES, LLAVA: _LLAVA_TEMPLATES} | _FAMILIES_OWN
_BY_RELEASE = {
    release: {name: replace(template, name=name, release=release) for name, template in templates.items()}
    for release, templates in _RELEASES.items()
}
RELEASES = tuple(_BY_RELEASE)

# Where releases disagree, LLaVA's meaning is the one that most checkpoints and users have (v1, llava_v1, ...).
# The two `###` names with the long example are LLaVA-Med v1.0's, which was trained with them: images stay in place.
_CANONICAL = {name: template for release in _FAMILIES_OWN for name, template in _BY_RELEASE[release].items()}
_CANONICAL |= _BY_RELEASE[V1_0] | _BY_RELEASE[LLAVA]
_CANONICAL["mistral_instruct"] = _BY_RELEASE[V1_5]["mistral_instruct"]
_CANONICAL |= {name: replace(_BY_RELEASE[V1_0]["default"], name=name) for name in ("default", "v0")}

conv_templates: dict[str, Conversation] = _CANONICAL | {
    f"{release}/{name}": template for release in RELEASES for name, template in _BY_RELEASE[release].items()
}
"""Every template by its canonical and by its qualified name. Take copies (`get_template`): turns are appended."""

default_conversation = conv_templates["vicuna_v1"]
"""What LLaVA's `preprocess` renders with if a fork sets nothing else (`llava.conversation.default_conversation`)."""
