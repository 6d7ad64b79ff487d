"""Dense Qwen 3.5 models, of text alone: most layers have a gated delta net instead of attention."""

from ..architecture import Checkpoint, Family, Slot
from .config import MODEL_TYPES, Qwen35Config, read_config
from .gguf import GGUF
from .model import Qwen35

__all__ = ["FAMILY", "Qwen35", "Qwen35Config"]

_SEVERAL_TOKENS = "mtp.*"


def _others(model: Qwen35) -> list[Slot]:
    config = model.structure
    assert isinstance(config, Qwen35Config)
    stem = config.stem
    slots = [
        Slot(model.embedding, [f"{stem}.embed_tokens.weight"]),
        Slot(model.norm.scale, [f"{stem}.norm.weight"]),
    ]
    for place, stack in enumerate(config.stacks):
        block = getattr(model.decoder, stack)
        norms = {
            "input_layernorm": block.input_norm,
            "post_attention_layernorm": block.mlp_norm,
        }
        if stack == "full":
            norms |= {
                "self_attn.q_norm": block.self_attn.q_norm,
                "self_attn.k_norm": block.self_attn.k_norm,
            }
            variables = {
                f"{name}.bias": getattr(block.self_attn, name).bias
                for name in config.biased
            }
        else:
            net = block.linear_attn
            norms["linear_attn.norm"] = net.norm
            variables = {
                "conv1d.weight": net.conv1d,
                "A_log": net.A_log,
                "dt_bias": net.dt_bias,
            }
        tensors = {f"{name}.weight": norm.scale for name, norm in norms.items()}
        mixer = "self_attn" if stack == "full" else "linear_attn"
        tensors |= {f"{mixer}.{name}": variable for name, variable in variables.items()}
        layers = range(place, config.num_layers, config.group)
        for name, variable in tensors.items():
            slots.append(
                Slot(
                    variable,
                    [f"{stem}.layers.{layer}.{name}" for layer in layers],
                    stacked=True,
                )
            )
    return slots


def _checkpoint(config: Qwen35Config) -> Checkpoint:
    return Checkpoint(
        embedding=f"{config.stem}.embed_tokens.weight",
        head="lm_head.weight",
        # The parts that predict several tokens, and that read images.
        unused=(_SEVERAL_TOKENS,),
        unread=()
        if config.stem == "model"
        else ("model.visual.*", "visual.*", _SEVERAL_TOKENS),
        others=_others,
    )


FAMILY = Family(
    name="qwen3_5",
    members="dense Qwen 3.5",
    model_types=MODEL_TYPES,
    names={"qwen": MODEL_TYPES},
    config=Qwen35Config,
    read_config=read_config,
    model=Qwen35,
    checkpoint=_checkpoint,
    gguf=GGUF,
    task_type="CAUSAL_LM",
    shapes={},
)
