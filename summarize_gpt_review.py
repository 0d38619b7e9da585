"""`python summarize_gpt_review.py`, as the published README has it: llava/eval/summarize_gpt_review.py."""

from llava.commandline import run
from llava.eval.summarize_gpt_review import main

if __name__ == "__main__":
    run(main)
