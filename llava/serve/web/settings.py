"""The page's settings: a slider for each sampling parameter that declares one."""

from collections.abc import Sequence

import gradio as gr

from llava.sampling_params import SamplingParams, sliders
from llava.serve.request_models import DEFAULT_NEW_TOKENS


class SettingsPanel:
    """`controls` are the components, in the order that `read` takes their values in."""

    def __init__(self):
        defaults = {"max_new_tokens": DEFAULT_NEW_TOKENS}
        self.names, self.controls = [], []
        with gr.Accordion("Settings", open=False):
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

    def read(self, values: Sequence[float]) -> SamplingParams:
        """Raises a LlavaError that names the setting."""
        return SamplingParams(**dict(zip(self.names, values, strict=True)))
