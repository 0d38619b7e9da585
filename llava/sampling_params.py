"""How answers are decoded: every sampling parameter, declared once.

A field of `SamplingFields` is a field of the API's and the worker's requests, with its range and what it is if not
given; one marked FLAG is a flag of the commands, one with a `Slider` a control of the web page; one that isn't at its
default is named in an answer file's manifest. What a parameter does is said in `llava.generation.sampling`. Needs no
torch.
"""

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from llava.commandline import ArgumentParser
from llava.errors import LlavaError, field_error

FLAG = "flag"
MOST_LOGPROBS = 20
MOST_SCHEMA = 65_536
"""Characters of a JSON schema."""
_LEAST_TEMPERATURE = 1e-5  # below, float32 divides by zero


@dataclass(frozen=True)
class Slider:
    """How the web page asks for a parameter."""

    low: float
    high: float
    step: float


def _number(value: Any) -> Any:
    """JSON has numbers: neither true nor "1" is one, though Python would take both."""
    if isinstance(value, (bool, str, bytes)):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def _tuple(value: Any) -> Any:
    """One text is a list of it; an empty one is none."""
    return ((value,) if value else ()) if isinstance(value, str) else value


def _small(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """A schema has to be compiled before anything is answered."""
    if schema is not None and (length := len(json.dumps(schema))) > MOST_SCHEMA:
        words = "The schema has {length} characters; at most {most} are taken"
        raise PydanticCustomError("too_long", words, {"length": length, "most": MOST_SCHEMA})
    return schema


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]
TokenId = Annotated[Whole, Field(ge=0, lt=1 << 31)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class Fields(BaseModel):
    """A model of pydantic's where null is the same as not given, as clients of OpenAI's API send it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if value is not None}


class SamplingFields(Fields):
    """The parameters that every request, command and page calls alike."""

    temperature: Annotated[Number, FLAG, Slider(0, 2, 0.05)] = Field(0.0, ge=0, le=10, description="0 is greedy")
    top_p: Annotated[Number, FLAG, Slider(0.05, 1, 0.05)] = Field(
        1.0, ge=0, le=1, description="draw from the likeliest tokens that reach this probability together"
    )
    top_k: Annotated[Whole, BeforeValidator(lambda value: 0 if value == -1 else value), FLAG, Slider(0, 200, 1)] = (
        Field(0, ge=0, lt=1 << 31, description="number of likeliest tokens to draw from; 0 (or -1) is all")
    )
    min_p: Annotated[Number, FLAG, Slider(0, 1, 0.05)] = Field(
        0.0, ge=0, le=1, description="draw only from tokens with so much of the likeliest one's probability"
    )
    repetition_penalty: Annotated[Number, FLAG, Slider(1, 2, 0.05)] = Field(
        1.0, gt=0, le=10, description="above 1 makes tokens of the prompt and of the answer so far less likely"
    )
    seed: Annotated[int | None, BeforeValidator(_number), FLAG] = Field(
        None, ge=-(2**63), le=2**64 - 1, description="the same seed draws the same answer"
    )
    stop: Annotated[tuple[StopText, ...], BeforeValidator(_tuple)] = Field(
        (), max_length=8, description="texts that end the answer and aren't part of it"
    )
    stop_token_ids: tuple[TokenId, ...] = Field(
        (), max_length=64, description="ids that end the answer, in addition to the model's own end mark"
    )
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[Number, Field(ge=-100, le=100)]] = Field(
        {}, max_length=1024, description="what is added to the logits of these ids"
    )
    json_schema: Annotated[dict[str, Any] | None, AfterValidator(_small)] = Field(
        None, description="the answer is JSON of this schema, without blanks between its signs"
    )
    ignore_eos: bool = Field(False, description="go on to the last token whatever the model says, for measurements")

    def common(self) -> dict[str, Any]:
        """The parameters of SamplingFields that were given, whatever class this is."""
        return {name: getattr(self, name) for name in SamplingFields.model_fields if name in self.model_fields_set}

    def openai_fields(self) -> dict[str, Any]:
        """These parameters as fields of a request to an OpenAI-compatible server; those at their default are left
        out, as not every server knows them all."""
        fields = self.model_dump(mode="json", include=set(SamplingFields.model_fields), exclude_defaults=True)
        if (schema := fields.pop("json_schema", None)) is not None:
            fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        return fields


class SamplingParams(SamplingFields):
    """All that decides how a request of the engine is decoded: `SamplingParams(temperature=0.7, top_p=0.9)`.

    Greedy by default. The same `seed` gives the same answer whatever else is answered at the same time.

    Raises:
        LlavaError: a value outside its range, or unknown; it names the parameter.
    """

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: Annotated[Whole, FLAG, Slider(1, 2048, 1)] = Field(
        1024, ge=1, le=1_000_000, description="longest answer in tokens"
    )
    logprobs: Whole | None = Field(
        None,
        ge=0,
        le=MOST_LOGPROBS,
        description="report each token's log-probability, with this number of alternatives",
    )
    num_beams: Annotated[Whole, FLAG] = Field(
        1, ge=1, le=64, description="above 1 is beam search, one request at a time"
    )

    def __init__(self, **given: Any):
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise LlavaError(field_error(error, show_value=True)) from error

    @model_validator(mode="after")
    def _check_beams(self) -> "SamplingParams":
        if self.num_beams > 1:
            if self.temperature:
                raise LlavaError("num_beams: beam search doesn't sample; set temperature to 0")
            for name in ("logprobs", "logit_bias", "repetition_penalty", "json_schema"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise LlavaError(f"num_beams: beam search takes no {name}")
        return self

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _LEAST_TEMPERATURE or self.top_k == 1

    def with_seed(self, seed: int | None) -> "SamplingParams":
        """The same, with another seed."""
        return self.model_copy(update={"seed": seed})


def sliders() -> dict[str, tuple[FieldInfo, Slider]]:
    """The parameters that a page asks for, in the order of their declaration."""
    found = {name: _marks(field, Slider) for name, field in SamplingParams.model_fields.items()}
    return {name: (SamplingParams.model_fields[name], marks[0]) for name, marks in found.items() if marks}


def add_sampling_flags(parser: ArgumentParser, **defaults: Any) -> None:
    """A flag for each parameter marked FLAG; `defaults` are the command's own. A default of None is "not given"."""
    group = parser.add_argument_group("decoding", "how answers are drawn")
    for name in _flags():
        field = SamplingParams.model_fields[name]
        kind = next(part for part in (float, int) if part in (field.annotation, *get_args(field.annotation)))
        default = defaults.get(name, field.default)
        group.add_argument(f"--{name}", type=kind, default=default, help=field.description)


def sampling_from_args(args: Namespace, **more: Any) -> SamplingParams:
    """The parameters that the flags of `add_sampling_flags` give.

    Raises:
        LlavaError: names the flag.
    """
    try:
        return SamplingParams(**{name: getattr(args, name) for name in _flags()}, **more)
    except LlavaError as error:
        raise LlavaError(f"--{error}") from error


def _flags() -> list[str]:
    return [name for name, field in SamplingParams.model_fields.items() if FLAG in field.metadata]


def _marks(field: FieldInfo, kind: type) -> list[Any]:
    return [mark for mark in field.metadata if isinstance(mark, kind)]
