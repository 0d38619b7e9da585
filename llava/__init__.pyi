from .assistant import Assistant as Assistant
from .assistant import load as load
from .conversation import Conversation as Conversation
from .conversation import conv_templates as conv_templates
from .errors import LlavaError as LlavaError
from .generation import Engine as Engine
from .images import open_image as open_image
from .model import LlavaLlamaForCausalLM as LlavaLlamaForCausalLM
from .model import LlavaMistralForCausalLM as LlavaMistralForCausalLM
from .model import load_pretrained_model as load_pretrained_model

__version__: str
