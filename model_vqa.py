"""`python model_vqa.py …`, as the published README has it: llava/eval/model_vqa.py."""

from llava.commandline import run
from llava.eval.model_vqa import main

if __name__ == "__main__":
    run(main)
