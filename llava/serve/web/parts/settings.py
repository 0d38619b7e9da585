"""The page's settings: a slider for each sampling parameter that declares one, and whether speed is shown."""

from collections.abc import Sequence

import gradio as gr

from llava.sampling_params import SamplingParams, sliders
from llava.serve.request_models import DEFAULT_NEW_TOKENS


class SettingsPanel:
    """`controls` are the sliders, in the order that `read` takes their values in; `speed` is a checkbox."""

    def __init__(self):
        defaults = {"max_new_tokens": DEFAULT_NEW_TOKENS}
        self.names, self.controls = [], []
        for name, (field, slider) in sliders().items():
            self.names.append(name)
            self.controls.append(
                gr.Slider(
                    slider.low,
                    slider.high,
                    defaults.get(name, field.default),
                    step=slider.step,
                    label=name.replace("_", " ").capitalize(),
                    info=field.description,
                    elem_id=f"setting-{name}",
                )
            )
        self.speed = gr.Checkbox(
            label="Show speed", info="seconds to the first word, tokens per second, under each answer", elem_id="speed"
        )

    def read(self, values: Sequence[float]) -> SamplingParams:
        """Raises a LlavaError that names the setting."""
        return SamplingParams(**dict(zip(self.names, values, strict=True)))
