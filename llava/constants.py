"""Special tokens and indices: the one place where each is defined."""

IGNORE_INDEX = -100
"""Label of a position that is not a training target (torch's cross entropy skips it)."""

IMAGE_TOKEN_INDEX = -200
"""Id that stands for an image in `input_ids`; no tokenizer has it, so text can't forge it."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"

RESEARCH_NOTICE = (
    "For research only. Not a medical device: never use its answers for diagnosis, treatment "
    "or any other clinical decision."
)
