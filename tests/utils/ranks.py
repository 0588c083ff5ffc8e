"""What the scripts that run on several ranks share: their model, and the files in which each rank says how its run ended."""

import json

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from architectures import TEXT
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForSequenceClassification

FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}


def tiny_bert(dropout=0.0):
    """A model that several ranks train as one rank does: nothing random, and a loss that is the mean over the rows."""
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = BertForSequenceClassification(BertConfig(**TEXT | rates))
    model.accepts_loss_kwargs = False  # its head ignores `num_items_in_batch` (transformers#47688)
    return model


def shard_on_the_cpu():
    """Accelerate shards on accelerators only, and takes the CPU for one when it is told so."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(tensor):
    """A tensor of the model, gathered if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()


def whole_weights(model):
    return {key: whole(value) for key, value in model.state_dict().items()}


def write_end(folder, rank, weights, **found):
    save_file(weights, folder / f"end-{rank}.safetensors")
    (folder / f"end-{rank}.json").write_text(json.dumps(found))
