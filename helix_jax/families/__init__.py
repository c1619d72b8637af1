"""Families of published models. Each is a table by which config.json and tensors are read and written."""

from helix_jax.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from helix_jax.families.family import Family, Tensor
from helix_jax.families.gemma3 import GEMMA3_TEXT
from helix_jax.families.glm4 import GLM4, GLM4_MOE
from helix_jax.families.gpt_oss import GPT_OSS
from helix_jax.families.granite import GRANITE
from helix_jax.families.llama import LLAMA, MISTRAL
from helix_jax.families.mixtral import MIXTRAL
from helix_jax.families.olmo import OLMO2, OLMO3
from helix_jax.families.phi3 import PHI3
from helix_jax.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from helix_jax.families.seed_oss import SEED_OSS
from helix_jax.families.smollm3 import SMOLLM3

FAMILIES = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL),
        *(GPT_OSS, GEMMA3_TEXT, DEEPSEEK_V2, DEEPSEEK_V3, GRANITE, SEED_OSS, SMOLLM3),
        *(PHI3, OLMO2, OLMO3, QWEN2_MOE, GLM4, GLM4_MOE),
    )
}

__all__ = ["FAMILIES", "Family", "Tensor"]
