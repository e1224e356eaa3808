"""The state, the structure and the embeddings of models with prompts."""

from softhooks.backbone.container import Container
from softhooks.backbone.examine import examine
from softhooks.backbone.word_embeddings import embed_ids
from softhooks.compat.peft import unwrapped
from softhooks.methods.from_prompt import rows_of
from softhooks.prompt import soft_prompts_of
from softhooks.runtime.direct_forward import route_direct_calls
from softhooks.runtime.prompted_model import PromptedModel, prompted_model_of, require_prompted_model
