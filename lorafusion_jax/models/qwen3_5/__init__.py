"""Dense Qwen 3.5 models, of text alone: most layers have a gated delta net instead of attention."""

from ..architecture import Checkpoint, Family, Slot
from ..decoder import slots_of_block, slots_of_model, stacked_slots
from .config import MODEL_TYPES, Qwen35Config, read_config
from .gguf import GGUF
from .model import Qwen35

__all__ = ["FAMILY", "Qwen35", "Qwen35Config"]

_SEVERAL_TOKENS = "mtp.*"


def _others(model: Qwen35) -> list[Slot]:
    config = model.structure
    assert isinstance(config, Qwen35Config)
    slots = slots_of_model(model)
    for place, stack in enumerate(config.stacks):
        block = getattr(model.decoder, stack)
        layers = range(place, config.num_layers, config.group)
        if stack == "full":
            slots += slots_of_block(block, config.of_attention, layers)
            continue
        net = block.linear_attn
        variables = {
            "input_layernorm.weight": block.input_norm.scale,
            "post_attention_layernorm.weight": block.mlp_norm.scale,
            "linear_attn.norm.weight": net.norm.scale,
            "linear_attn.conv1d.weight": net.conv1d,
            "linear_attn.A_log": net.A_log,
            "linear_attn.dt_bias": net.dt_bias,
        }
        slots += stacked_slots(variables, config, layers)
    return slots


def _checkpoint(config: Qwen35Config) -> Checkpoint:
    return Checkpoint(
        embedding=config.embedding,
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
