"""What people do to a model while they train it: a loop with the cache has the losses of one without."""

import pytest
import torch
import transformers as t
from architectures import IMAGE, TEXT, build
from odd_models import llava
from peft import LoraConfig, get_peft_model
from torch import nn
from versions import RENAMED, checkpoint_activations

from smartfrz_hf import Freezer, find_blocks
from smartfrz_hf.activation_cache import ActivationCache, ActivationStore

pytestmark = [
    pytest.mark.usefixtures("patient"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),  # said by peft
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`"),
]


def make(name="bert", kind=None):
    """A tiny model with larger weights, so that each block changes what enters it."""
    model = build(name)
    if kind is not None:
        model.__class__ = type(kind.__name__, (kind, type(model)), {})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


class Loop:
    """A training loop over three batches of rows of four lengths, whose front grows at the start and at step 9."""

    def __init__(self, model, with_cache, blocks=None, batches=None, depths=(3, 4)):
        self.model, self.stack = model.train(), find_blocks(model, blocks)
        self.batches = batches or self.make_batches(causal="LM" in type(model).__name__)
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        self.freezer = Freezer(self.stack, self.optimizer)
        self.cache = ActivationCache(self.stack, ActivationStore(2**24), None, 200, 3) if with_cache else None
        self.depths, self.step, self.losses = dict(zip((0, 9), depths, strict=True)), 0, []

    @staticmethod
    def make_batches(causal):
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 99, (12, 12), generator=draw)
        mask = torch.stack([(torch.arange(12) < 12 - i % 4).long() for i in range(12)])
        labels = ids.masked_fill(mask == 0, -100) if causal else ids[:, 0] % 2
        whole = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return [{name: value[i : i + 4] for name, value in whole.items()} for i in (0, 4, 8)]

    def run(self, steps, mode=True):
        for _ in range(steps):
            if self.step in self.depths:
                depth = min(self.depths[self.step], len(self.stack))
                self.freezer.freeze_to(depth)
                if self.cache is not None:
                    self.cache.freeze_to(depth)
            self.model.train(mode)
            loss = self.model(**self.batches[self.step % len(self.batches)])["loss"]
            if loss.requires_grad:
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if self.cache is not None:
                self.cache.end_of_step(self.step)
            self.losses.append(float(loss.detach()))

    def evaluate(self):
        self.model.eval()
        self.losses += [float(self.model(**batch)["loss"]) for batch in self.batches]


def bfloat16_in_between(with_cache):
    loop = Loop(make(), with_cache)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        loop.model.to(dtype)
        loop.run(6)
    return loop


def a_callback_calls_eval(with_cache):
    loop = Loop(make(), with_cache)
    for mode in (True, True, False, True) * 4:
        loop.run(1, mode)
    return loop


def generation(with_cache):
    loop = Loop(make("gpt2"), with_cache)
    for _ in range(4):
        loop.run(4)
        loop.model.eval()
        ids = loop.batches[0]["input_ids"][:1]
        for use_cache in (True, False):
            options = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
            found = loop.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            loop.losses += found[0].float().tolist()
    return loop


def inference_mode(with_cache):
    loop = Loop(make(), with_cache)
    for _ in range(3):
        loop.run(4)
        for context in (torch.inference_mode(), torch.no_grad()):
            with context:
                loop.evaluate()
    return loop


class TrainOfItsOwn(nn.Module):
    def train(self, mode=True):
        for module in self.modules():
            module.training = mode
        return self


def a_train_of_its_own(with_cache):
    loop = Loop(make(kind=TrainOfItsOwn), with_cache)
    loop.run(16)
    frozen = [
        m for unit in loop.stack.units[: loop.freezer.depth] for top in unit.modules.values() for m in top.modules()
    ]
    assert not any(module.training for module in frozen)
    return loop


def _parametrized(with_cache, parametrize):
    model = make()
    for module in [*(layer.output.dense for layer in model.bert.encoder.layer), model.classifier]:
        parametrize(module)
    loop = Loop(model, with_cache)
    loop.run(16)
    return loop


def spectral_norm(with_cache):
    return _parametrized(with_cache, nn.utils.parametrizations.spectral_norm)


def weight_norm(with_cache):
    return _parametrized(with_cache, nn.utils.parametrizations.weight_norm)


def weight_norm_by_hooks(with_cache):
    return _parametrized(with_cache, nn.utils.weight_norm)


def lookahead(with_cache):
    """An optimizer that pulls all weights back through `.data`, frozen ones too."""
    loop = Loop(make(), with_cache)
    slow = {parameter: parameter.detach().clone() for parameter in loop.model.parameters()}
    for _ in range(4):
        loop.run(4)
        for parameter, value in slow.items():
            value += 0.5 * (parameter.detach() - value)
            parameter.data.copy_(value)
    return loop


class Follower(nn.Module):
    """Has a teacher that follows it, a queue of its outputs, and a counter, as momentum contrast has."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.training:
            self.teacher.weight.data.mul_(0.9).add_(self.classifier.weight.data, alpha=0.1)
            self.queue = torch.cat([self.queue[4:], output.logits.detach()[:4]])
            self.calls += 1
            self.seen.append(self.calls)
        output["loss"] = output.loss * (1 + 0.01 * self.calls) + output.logits.mean() * self.teacher.weight.sum()
        output["loss"] = output.loss + output.logits.mean() * self.queue.mean()
        return output


def a_forward_pass_that_changes_the_model(with_cache):
    model = make(kind=Follower)
    model.teacher, model.calls, model.seen = nn.Linear(32, 2).requires_grad_(False), 0, []
    model.register_buffer("queue", torch.zeros(8, 2))
    with torch.no_grad():
        model.teacher.weight.copy_(model.classifier.weight)
    loop = Loop(model, with_cache)
    before, after = model.calls, 16
    loop.run(after)
    assert model.calls == before + after == len(model.seen)
    return loop


def checkpointing_in_between(with_cache):
    loop = Loop(make(), with_cache)
    loop.run(5)
    checkpoint_activations(loop.model, reentrant=True)
    loop.model.enable_input_require_grads()
    loop.run(10)
    return loop


def blocks_compiled_in_between(with_cache):
    loop = Loop(make(), with_cache)
    loop.run(7)
    for block in loop.stack.blocks:
        block.compile(backend="eager")
    loop.run(6)
    return loop


def a_vocabulary_that_grows(with_cache):
    loop = Loop(make("gpt2"), with_cache)
    loop.run(7)
    torch.manual_seed(0)
    loop.model.resize_token_embeddings(110, mean_resizing=False)
    loop.optimizer = torch.optim.SGD([p for p in loop.model.parameters() if p.requires_grad], lr=0.05)
    loop.run(8)
    return loop


def merged_adapters(with_cache):
    lora = LoraConfig(target_modules=["query"], r=2, init_lora_weights=False, modules_to_save=["classifier"])
    loop = Loop(get_peft_model(make(), lora), with_cache)
    loop.run(7)
    loop.model.merge_adapter()
    loop.run(6)
    loop.model.unmerge_adapter()
    loop.run(6)
    return loop


class Blocks(nn.Module):
    """Four blocks; `before` is called with the embeddings and the labels, `norm` makes a layer between the blocks."""

    def __init__(self, before=lambda model, hidden, labels: hidden, norm=nn.Identity):
        super().__init__()
        self.before = before
        self.embed, self.labels = nn.Embedding(99, 16), nn.Embedding(2, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), norm(), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.before(self, self.embed(input_ids), labels)
        for layer in self.layers:
            hidden = layer(hidden)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.head((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))
        return {
            "loss": logits.sum() if labels is None else nn.functional.cross_entropy(logits, labels),
            "logits": logits,
        }


def a_front_that_reads_labels(with_cache):
    """As encoder-decoders do, which feed them to their decoder."""
    loop = Loop(
        Blocks(lambda m, hidden, labels: hidden if labels is None else hidden + m.labels(labels)[:, None]), with_cache
    )
    loop.batches += [batch | {"labels": 1 - batch["labels"]} for batch in loop.batches]
    loop.run(24)
    return loop


class Temperature:
    value = None


def a_setting_in_an_object(with_cache):
    temperature = Temperature()
    temperature.value = 1.0
    model = Blocks(lambda model, hidden, labels: hidden * model.layers[0].temperature.value)
    model.layers[0].temperature = temperature
    loop = Loop(model, with_cache)
    for value in (1.0, 2.0, 1.0):
        temperature.value = value
        loop.run(6)
    return loop


def rows_that_see_each_other(with_cache):
    class Mixing(nn.Module):
        def forward(self, hidden):
            return hidden - hidden.mean(0)

    loop = Loop(Blocks(norm=Mixing), with_cache)
    whole = {name: torch.cat([batch[name] for batch in loop.batches]) for name in loop.batches[0]}
    draw = torch.Generator().manual_seed(0)
    orders = [torch.randperm(12, generator=draw)[:4] for _ in range(20)]
    loop.batches = [{name: value[order] for name, value in whole.items()} for order in orders]
    loop.run(20)
    return loop


# Whether rows have to be found.
FOUND = {
    bfloat16_in_between: True,
    a_callback_calls_eval: True,
    generation: True,
    inference_mode: True,
    a_train_of_its_own: True,
    spectral_norm: True,
    weight_norm: True,
    weight_norm_by_hooks: False,
    lookahead: True,
    a_forward_pass_that_changes_the_model: True,
    checkpointing_in_between: True,
    blocks_compiled_in_between: True,
    a_vocabulary_that_grows: True,
    merged_adapters: True,
    a_front_that_reads_labels: True,
    a_setting_in_an_object: True,
    rows_that_see_each_other: None,
}


@pytest.mark.parametrize("what", FOUND, ids=lambda what: what.__name__)
def test_losses_are_those_without_the_cache(what):
    loops = []
    for with_cache in (False, True):
        torch.manual_seed(0)
        loops.append(what(with_cache))
    plain, cached = (torch.tensor(loop.losses) for loop in loops)
    cache = loops[1].cache
    cache.close()
    assert len(plain) > 10
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)
    assert FOUND[what] is None or (cache.savings.hits > 0) == FOUND[what], cache.savings


def test_padding_is_tried_on_both_sides():
    class AddFirst(nn.Module):
        """Reads padding in front of a row, and none behind it."""

        def forward(self, hidden):
            return hidden + hidden[:, :1]

    model = Blocks(norm=AddFirst).eval()
    model.layers[2][1] = model.layers[3][1] = nn.Identity()  # behind the boundary, nothing reads padding
    stack = find_blocks(model)
    Freezer(stack).freeze_to(3)
    cache = ActivationCache(stack, ActivationStore(2**24))
    cache._padding.unread = True
    cache.freeze_to(3)
    ids = torch.randint(5, 99, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 6:] = 0
    with torch.no_grad():
        for filler in (1, 1, 2):
            batch = {"input_ids": ids.masked_fill(mask == 0, filler), "attention_mask": mask}
            found = model(**batch)["logits"]
            with cache.bypassed():
                torch.testing.assert_close(found, model(**batch)["logits"])
    assert cache.savings.hits and cache.savings.off is None
    cache.close()


# Models of two kinds of input, their blocks named by hand.


def paligemma():
    text = t.GemmaConfig(**TEXT | {"num_key_value_heads": 2, "head_dim": 8})
    vision = t.SiglipVisionConfig(**IMAGE)
    sizes = {"image_token_index": 98, "projection_dim": 32, "hidden_size": 32}
    return t.PaliGemmaForConditionalGeneration(t.PaliGemmaConfig(vision_config=vision, text_config=text, **sizes))


def blip(kind=t.BlipForConditionalGeneration):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    text = TEXT | tokens | {"projection_dim": 16, "encoder_hidden_size": 32}
    vision = IMAGE | {"projection_dim": 16}
    sizes = {"projection_dim": 16, "image_text_hidden_size": 16}
    return kind(t.BlipConfig(text_config=text, vision_config=vision, **sizes))


def pictures_and_words(model):
    draw = torch.Generator().manual_seed(0)
    words, places = torch.randint(5, 90, (4, 8), generator=draw), 16 if hasattr(model.config, "image_token_id") else 0
    ids = torch.cat([torch.full((4, places), 98), words], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == 98, -100)}
    batch["pixel_values"] = torch.rand(4, 3, 32, 32, generator=draw)
    if isinstance(model, t.PaliGemmaForConditionalGeneration):
        batch["token_type_ids"] = (torch.arange(ids.shape[1]) >= places + 4).long().expand_as(ids)
    return batch


def blip_for_questions():
    return blip(t.BlipForQuestionAnswering)


@pytest.mark.parametrize(
    ("make", "blocks", "off"),
    [
        (paligemma, "model.vision_tower.*encoder.layers.*", None),
        (paligemma, "model.language_model.layers.*", "`inputs_embeds` requires a gradient"),
        (blip, "vision_model.encoder.layers.*", None),
        # In earlier versions what the images give comes as a keyword argument of the blocks.
        (
            blip,
            "text_decoder.bert.encoder.layer.*",
            None if RENAMED else "`encoder_hidden_states` requires a gradient",
        ),
        (blip_for_questions, "text_encoder.encoder.layer.*", None),
        (blip_for_questions, "text_decoder.bert.encoder.layer.*", None),
        (llava, "model.vision_tower.*encoder.layers.*", "`output_hidden_states` is asked for"),
    ],
)
def test_pictures_and_words(make, blocks, off):
    loops, gradients = [], []
    for with_cache in (False, True):
        torch.manual_seed(0)
        model = make()
        loop = Loop(model, with_cache, [blocks], [pictures_and_words(model)], depths=(2, 4))
        loop.run(15)
        model(**loop.batches[0]).loss.backward()
        loops.append(loop)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    cache = loops[1].cache
    cache.close()
    torch.testing.assert_close(torch.tensor(loops[1].losses), torch.tensor(loops[0].losses), rtol=1e-4, atol=1e-4)
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)
    assert cache.savings.off == off and (cache.savings.hits > 0) == (off is None)
