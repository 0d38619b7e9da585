"""Special tokens, indices and names that several packages share: the one place where each is defined."""

IGNORE_INDEX = -100
"""Label of a position that is not a training target (torch's cross entropy skips it)."""

IMAGE_TOKEN_INDEX = -200
"""Id that stands for an image in `input_ids`; no tokenizer has it, so text can't forge it."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
MOST_OF_TOKEN = 256
"""Characters of a token; LLaMA's longest have 16, sentencepiece's own cap is 512 bytes."""
SCHEME_PLACEHOLDER, SCHEME_PATCH = "placeholder", "patch"
"""How an image stands in the text (llava.tokenization.image_tokens): one placeholder, or v1.0's run of <im_patch>."""
IMAGE_PLACEHOLDER = "<image-placeholder>"
"""What LLaVA's scripts write in a question where an image belongs; it becomes DEFAULT_IMAGE_TOKEN."""

FIGURE_DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
"""The kinds of figure that LLaVA-Med's files tell apart."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30
"""Seconds without a heartbeat after which the controller takes a worker for dead."""
WORKER_HEART_BEAT_INTERVAL = 15
"""Seconds between two heartbeats of a worker."""
LOGDIR = "."
"""Folder of `llava.utils.build_logger`'s files."""

RESEARCH_NOTICE = (
    "For research only. Not a medical device: never use its answers for diagnosis, treatment "
    "or any other clinical decision."
)
NO_IMAGE = "No image: the answer is made from the words alone."
"""What whoever asks without an image reads."""
