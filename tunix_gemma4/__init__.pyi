# SPDX-License-Identifier: Apache-2.0
from . import (
    checkpoint as checkpoint,
    config as config,
    data as data,
    lora as lora,
    losses as losses,
    recipes as recipes,
    rewards as rewards,
    sampling as sampling,
    sharding as sharding,
    testing as testing,
)
from .checkpoint import load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
from .config import (
    LayerSpec as LayerSpec,
    ModelConfig as ModelConfig,
    RematConfig as RematConfig,
    VisionConfig as VisionConfig,
)
from .data import Batch as Batch, Processor as Processor, make_dataset as make_dataset
from .lora import (
    LoraConfig as LoraConfig,
    apply_lora as apply_lora,
    load_adapter as load_adapter,
    merge_lora as merge_lora,
    save_adapter as save_adapter,
)
from .model.gemma4 import (
    Gemma4ForConditionalGeneration as Gemma4ForConditionalGeneration,
    Gemma4ForTokenScores as Gemma4ForTokenScores,
    stack_layers as stack_layers,
    unstack_layers as unstack_layers,
)
from .planning.plan import plan as plan
from .plugin.optimizer import make_optimizer as make_optimizer, make_schedule as make_schedule
from .plugin.register import (
    HOOKS as HOOKS,
    register as register,
    status as status,
    unregister as unregister,
)
from .plugin.rl.learner import set_processor as set_processor
from .plugin.sft.trainer import Gemma4Trainer as Gemma4Trainer, TrainingConfig as TrainingConfig
from .sampling import generate as generate

__version__: str
