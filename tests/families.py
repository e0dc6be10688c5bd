"""Every model family that is shown to equal the full model when split: tiny configs of six layers.

`docs/models.md` is made of this list, and `tests/test_families.py` holds it equal to it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

LABELS = ("no", "perhaps", "yes")

_COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """A model type, and how to make a tiny one of it."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    variant: str = ""  # what is special, where a model type is here more than once
    in_both: tuple[str, ...] = ()  # weights outside the layers that client and trunk both need
    classifier: bool = False

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.variant}" if self.variant else self.model_type

    def config(self) -> PretrainedConfig:
        return AutoConfig.for_model(self.model_type, **{**_COMMON, **self.changes})

    @property
    def auto(self) -> Any:
        return AutoModelForSequenceClassification if self.classifier else AutoModelForCausalLM

    def save(self, folder: Path) -> None:
        """A random model whose layers all matter: weights far larger than the default initialisation."""
        config = self.config()
        if self.classifier:
            config.id2label = dict(enumerate(LABELS))
        torch.manual_seed(0)
        model = self.auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.dim() == 1:  # norms and biases
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_(0.2 * noise)
        model.save_pretrained(folder)


DECODERS = [
    Family("llama"),
    Family("mistral", {"sliding_window": 4}),
    Family("mixtral", _EXPERTS),
    Family("qwen2"),
    Family("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}, "sliding"),
    Family("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    Family("qwen3", {"head_dim": 8}),
    Family("qwen3_moe", {**_EXPERTS, "head_dim": 8}),
    Family("gemma", {"head_dim": 8}),
    Family("gemma2", {"head_dim": 8, "sliding_window": 4}),
    Family("gemma3_text", {"head_dim": 8, "sliding_window": 4}),
    Family("phi"),
    Family("phi3"),
    Family("gpt2"),
    Family("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled"),
    Family("gpt_neox"),
    Family("gpt_neo", {"attention_types": [[["global", "local"], 3]], "window_size": 4}),
    Family("gptj", {"rotary_dim": 4}),
    Family("codegen", {"rotary_dim": 4}),
    Family("gpt_bigcode"),
    Family("gpt_oss", {**_EXPERTS, "head_dim": 8, "sliding_window": 4}),
    Family("opt"),
    Family("opt", {"word_embed_proj_dim": 16}, "projected"),
    Family("bloom"),
    Family("falcon"),
    Family("mpt"),
    Family("stablelm"),
    Family("olmo"),
    Family("olmo2"),
    Family("olmo3", {"sliding_window": 4}),
    Family("olmoe", _EXPERTS),
    Family("starcoder2", {"sliding_window": 4}),
    Family("cohere"),
    Family("cohere2", {"sliding_window": 4}),
    Family("granite"),
    Family("granitemoe", _EXPERTS),
    Family("smollm3"),
    Family(
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 2,
            "num_key_value_heads": 4,
        },
    ),
    Family("nemotron"),
    Family("glm", {"head_dim": 8}),
    Family("glm4", {"head_dim": 8}),
    Family("biogpt"),
    Family("xglm"),
    Family("persimmon"),
    Family("exaone4"),
    Family("minimax", _EXPERTS),
    Family("lfm2"),
    Family("arcee"),
    Family("ernie4_5"),
    Family("seed_oss"),
    Family("hunyuan_v1_dense", {"head_dim": 8}),
    Family("apertus"),
    Family("helium", {"head_dim": 8}),
    Family("ministral", {"head_dim": 8}),
    Family("diffllama"),
    Family("modernbert-decoder", {"local_attention": 4, "global_attn_every_n_layers": 2}),
]

_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}
_DEBERTA_BOTH = ("encoder.rel_embeddings.weight",)
CLASSIFIERS = [
    Family("bert", classifier=True),
    Family("roberta", classifier=True),
    Family("distilbert", classifier=True),
    Family("electra", {"embedding_size": 16}, classifier=True),
    Family("modernbert", {"local_attention": 4, "global_attn_every_n_layers": 2}, classifier=True),
    Family("xlm-roberta", classifier=True),
    Family("camembert", classifier=True),
    Family("mpnet", classifier=True, in_both=("encoder.relative_attention_bias.weight",)),
    Family("deberta", _DEBERTA, classifier=True, in_both=_DEBERTA_BOTH),
    Family(
        "deberta-v2",
        {**_DEBERTA, "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_buckets": 8},
        classifier=True,
        in_both=(*_DEBERTA_BOTH, "encoder.LayerNorm.weight", "encoder.LayerNorm.bias"),
    ),
    Family("roformer", classifier=True, in_both=("encoder.embed_positions.weight",)),
    Family("rembert", classifier=True),
    Family("megatron-bert", classifier=True),
    Family("llama", classifier=True),
    Family("qwen3", {"head_dim": 8}, classifier=True),
    Family("gemma3_text", {"head_dim": 8, "sliding_window": 4}, classifier=True),
    Family("gpt2", classifier=True),
]


def table() -> str:
    """The table in the docs: one row per model type."""
    rows = {}
    for family in (*DECODERS, *CLASSIFIERS):
        kinds, variants, both = rows.setdefault(family.model_type, ([], [], []))
        kinds.append("sequence-classification" if family.classifier else "causal-lm")
        variants += [family.variant] if family.variant else []
        both += family.in_both
    lines = ["| model type | tasks | also tested | held by both parties |", "|---|---|---|---|"]
    for name, (kinds, variants, both) in sorted(rows.items()):
        tasks = ", ".join(f"`{kind}`" for kind in dict.fromkeys(kinds))
        lines.append(f"| `{name}` | {tasks} | {', '.join(variants)} | {', '.join(f'`{b}`' for b in both)} |")
    return "\n".join(lines)
